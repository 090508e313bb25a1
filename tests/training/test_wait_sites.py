"""Places at which ranks wait: stacks on CPUs and GPUs, and a hang in which victims read a value."""

from __future__ import annotations

import ast
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

import megatron_llmjp.training
from megatron_llmjp.training import watchdog
from megatron_llmjp.training.wait_sites import GPU_WAITS, Frame, find_wait, is_known_wait
from tests.gpu.allowed_waits import ALLOWED
from tests.support.processes import ROOT, run_ranks
from tests.support.timeouts import PROCESS_TIMEOUT

SITE = "/venv/lib/python3.12/site-packages"
CORE = f"{SITE}/megatron/core"
TRAINING = "/checkout/megatron_llmjp/training"
TRAINER = Frame(f"{TRAINING}/trainer.py", "_train")


@pytest.mark.parametrize(
    ("inner", "on_cpu", "on_gpu", "is_known"),
    [
        # over gloo and NCCL
        ((f"{SITE}/torch/distributed/distributed_c10d.py", "all_reduce"), "other ranks", 0, True),
        (
            (f"{CORE}/pipeline_parallel/p2p_communication.py", "f"),
            "other ranks",
            0,
            1,
        ),
        ((f"{TRAINING}/stop_signals.py", "agreed"), "other ranks", 0, True),
        # the host reads a value from the GPU
        (
            (f"{CORE}/optimizer/clip_grads.py", "get_grad_norm_fp32"),
            "",
            "its GPU",
            True,
        ),
        ((f"{TRAINING}/train_step.py", "means_over_ranks"), "", "its GPU", True),
        ((f"{SITE}/torch/cuda/__init__.py", "synchronize"), "", "its GPU", True),
        # kernels are launched; their queue is full
        ((f"{SITE}/torch/nn/functional.py", "embedding"), "", "its GPU", False),
        ((f"{CORE}/transformer/mlp.py", "forward"), "", "its GPU", False),
        ((f"{SITE}/torch/_inductor/runtime/triton_heuristics.py", "run"), "", "its GPU", False),
        (("/tmp/torchinductor_me/ab/cab.py", "call"), "", "its GPU", False),
        # work on the host
        ((f"{SITE}/torch/utils/data/dataloader.py", "_try_get_data"), "", "", False),
        ((f"{SITE}/torch/_inductor/codecache.py", "compile"), "", "", False),
        ((f"{CORE}/datasets/indexed_dataset.py", "get"), "", "", False),
        ((f"{TRAINING}/train_step.py", "zero_sums"), "", "", False),
        (("/checkout/megatron_llmjp/data/dataset.py", "__getitem__"), "", "", False),
        (("/usr/lib/python3.12/threading.py", "wait"), "", "", False),
    ],
)
def test_stacks(inner, on_cpu, on_gpu, is_known):
    stack = [TRAINER, Frame(*inner)]
    assert find_wait(stack, on_gpu=False) == on_cpu
    assert find_wait(stack, on_gpu=True) == (on_gpu or on_cpu)
    assert is_known_wait(stack, on_gpu=True) == bool(is_known)
    assert not is_known_wait([], on_gpu=True) and find_wait([], on_gpu=True) == ""


READS = {"item", "tolist", "synchronize", "_cuda_synchronize", "float", "get_loss_scale"}
"""Names of the calls that wait for the device."""


def functions_that_read(file: Path, names: set[str]) -> set[str]:
    """Return the functions of a file that call one of some names."""
    found = set()
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef):
            called = {call.func for call in ast.walk(function) if isinstance(call, ast.Call)}
            ids = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called}
            found |= {function.name} if ids & names else set()
    return found


def installed_file(name: str) -> Path:
    paths = [Path(entry) / name for entry in [str(ROOT), *sys.path]]
    return next(path for path in paths if path.is_file())


@pytest.mark.parametrize("name", GPU_WAITS)
def test_each_place_exists_and_reads_from_the_device(name):
    assert set(GPU_WAITS[name]) <= functions_that_read(installed_file(name), READS)


def test_each_read_of_the_training_loop_is_known():
    """Values of CPU tensors are read in stop_signals.py only."""
    folder = Path(megatron_llmjp.training.__file__).parent
    for file in sorted(folder.glob("*.py")):
        known = GPU_WAITS.get(f"megatron_llmjp/training/{file.name}", ())
        if file.name != "stop_signals.py":
            assert functions_that_read(file, {"item", "tolist"}) <= set(known), file.name


def test_each_wait_of_a_step_on_the_fake_machine_is_known():
    """Those that ``tests/gpu`` has seen to read values; copies are synchronous too, and brief."""
    seen = {wait.place for wait in ALLOWED if wait.operation in ("item", "tolist")}
    stacks = {place: [TRAINER, Frame(*f"{SITE}/{place}".rsplit(":", 1))] for place in seen}
    assert stacks and [p for p, stack in stacks.items() if not is_known_wait(stack, True)] == []


class ValuesOnGpu:
    """Sums that a GPU computes once all ranks have joined: reading them blocks in C code."""

    def __init__(self) -> None:
        lock = threading.Lock()
        lock.acquire()
        self.tolist = lock.acquire

    def double(self) -> ValuesOnGpu:
        return self

    def flatten(self) -> ValuesOnGpu:
        return self


def hang_as_in_nccl(folder: str, culprit: int) -> None:
    """Let collectives return at once, and all ranks but one read their result."""
    import torch
    import torch.distributed as dist

    from megatron_llmjp.training import train_step

    watchdog.GRACE_SECONDS = 2.0
    torch._C._distributed_c10d._dump_nccl_trace_json = lambda **_: b'{"entries": []}'
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    store = dist.distributed_c10d._get_default_store()
    train_step.dist.all_reduce = lambda tensor: None
    watch = watchdog.Watchdog(store, dist.get_rank(), 3, 0.02, Path(folder), on_gpu=True)
    watch.start()
    watch.begin(7, "a step", counts_work=True)
    if dist.get_rank() == culprit:
        time.sleep(10 * PROCESS_TIMEOUT)
    train_step.means_over_ranks(ValuesOnGpu())  # type: ignore[arg-type]


def test_victims_of_a_hang_in_nccl_are_not_blamed(tmp_path):
    with pytest.raises(AssertionError, match="failed"):
        run_ranks(hang_as_in_nccl, 3, str(tmp_path), 1)
    report = (tmp_path / "report.txt").read_text().splitlines()
    assert report[1].startswith("rank 1 on") and report[1].endswith("<- check first")
    assert report[2].startswith("ranks 0, 2 on") and "in means_over_ranks" in report[2]
    assert "waits for its GPU, which may wait for other ranks" in report[2]
    assert (tmp_path / "collectives-rank00002.json").read_text() == '{"entries": []}'
