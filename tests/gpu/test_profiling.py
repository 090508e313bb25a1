"""nsys, NVTX ranges, CUDA events and memory snapshots on the fake GPU machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_llmjp.config.flags import parse
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.instruments import install_instruments
from megatron_llmjp.training.memory_history import record_memory_history
from megatron_llmjp.training.out_of_memory import explain_out_of_memory
from tests.gpu.machine.library import why_missing
from tests.gpu.machine.process import run_on_machine
from tests.gpu.machine.rank import Machine

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

GPU = Device("cuda", "nccl", "NVIDIA H100 80GB HBM3")
FLAGS = """--profile --profile-step-start 1 --profile-step-end 3 --nvtx-ranges --record-shapes
--record-memory-history --profile-ranks 0 2"""


def record_calls() -> list[Any]:
    """Replace what needs a CUDA build of torch; return the list of calls."""
    calls: list[Any] = []

    class Ranges:
        def __init__(self, record_shapes: bool) -> None:
            calls.append(f"emit_nvtx record_shapes={record_shapes}")

        def __enter__(self) -> None:
            calls.append("ranges on")

        def __exit__(self, *_: object) -> None:
            calls.append("ranges off")

    cuda: Any = torch.cuda
    core: Any = torch._C
    torch.autograd.profiler.emit_nvtx = Ranges  # type: ignore[assignment, misc]
    cuda.profiler.start = lambda: calls.append("start")
    cuda.profiler.stop = lambda: calls.append("stop")
    cuda.nvtx.range_push = lambda name: calls.append(f"push {name}")
    cuda.nvtx.range_pop = lambda: calls.append("pop")
    cuda.memory._record_memory_history = lambda **given: calls.append(f"record {sorted(given)}")
    cuda.memory._dump_snapshot = lambda path: calls.append(f"snapshot {path}")
    core._cuda_attach_out_of_memory_observer = lambda observer: calls.append(observer)
    return calls


def profiled_steps(machine: Machine, folder: str, rank: int) -> dict[str, Any]:
    """Run four steps of one micro-batch under the instruments, and run out of memory."""
    calls = record_calls()
    command = ["--config", "laptop-llama", "--save", folder, *FLAGS.split()]
    config = parse(command).config
    core = SimpleNamespace(timers=None)
    chunk: Any = SimpleNamespace(config=core)
    record_memory_history(config, rank)
    observer = calls.pop()
    observer(0, 1, 2, 3)
    history = calls.copy()
    calls.clear()
    instruments = install_instruments(config, [chunk], GPU, rank, ["host"] * 4)
    steps = []
    with instruments:
        for iteration in range(4):
            with instruments.step(iteration):
                core.timers("forward-backward", log_level=1).start(barrier=True)
                core.timers("forward-compute", log_level=2).start()
                core.timers("forward-compute").stop()
                core.timers("forward-backward").stop()
            steps.append(calls.copy())
            calls.clear()
    weight = torch.nn.Parameter(torch.zeros(300, 20, device="cuda"))
    chunk.named_parameters = lambda: [("module.module.weight", weight)]
    state = {weight: {"exp_avg": torch.zeros(300, 20, device="cuda")}}
    optimizer = SimpleNamespace(
        param_groups=[{"params": [weight]}], optimizer=SimpleNamespace(state=state)
    )
    with (
        pytest.raises(torch.OutOfMemoryError),
        explain_out_of_memory([chunk], optimizer, GPU, rank, instruments_folder(folder)),
    ):
        x = torch.zeros(5000, 4, device="cuda")
        raise torch.OutOfMemoryError(f"no memory after {x.shape}")
    report = (instruments_folder(folder) / f"out-of-memory-rank{rank}.txt").read_text()
    waits = [wait.operation for wait in machine.waits.take()]
    times = instruments.timer.medians()[:2]
    return {"history": history, "steps": steps, "report": report, "waits": waits, "times": times}


def instruments_folder(folder: str) -> Any:
    from megatron_llmjp.training.memory_history import profile_folder

    return profile_folder(parse(["--config", "laptop-llama", "--save", folder]).config)


RANGES = ["push forward-backward", "push forward-compute", "pop", "pop"]


@pytest.mark.parametrize("rank", [2, 1])
def test_profiling(tmp_path, rank):
    found = run_on_machine(profiled_steps, str(tmp_path), rank)
    snapshot = f"snapshot {tmp_path}/profile/memory-rank{rank}.pickle"
    assert found["history"] == ["record ['max_entries', 'stacks']", snapshot]
    is_profiled = rank == 2
    begin = ["start", "emit_nvtx record_shapes=True", "ranges on"] if is_profiled else []
    end = ["ranges off", "stop", snapshot] if is_profiled else []
    assert found["steps"] == [RANGES, [*begin, *RANGES], [*RANGES, *end], RANGES]
    assert found["waits"] == []  # events are read without waiting for the device
    assert found["times"] == [0.001, 0.0]  # an event of the machine takes 1 ms
    lines = found["report"].splitlines()
    assert lines[0] == f"error: rank {rank} is out of memory on NVIDIA H100 80GB HBM3"
    assert lines[1].endswith("held by autograd and libraries 1.1 GB")
    assert " ".join(lines[3].split()) == (
        "0.1 MB float32 5000 x 4 activations and others: x in profiled_steps"
    )
    assert [line.split() for line in lines[4:6]] == [
        ["0.0", "MB", "float32", "300", "x", "20", "parameters:", "weight"],
        ["0.0", "MB", "float32", "300", "x", "20", "optimizer", "state:", "exp_avg", "0"],
    ]
