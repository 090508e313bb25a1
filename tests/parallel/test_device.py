"""The device of a rank: which GPUs are expected and which are seen, and the agreement of ranks."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_llmjp.errors import RunError, UserError
from megatron_llmjp.parallel.device_agreement import RankDevice, compare_devices
from megatron_llmjp.parallel.visible_gpus import find_gpus
from tests.support.datasets import write_folds
from tests.support.forks import ROOT, Fork, be_program, run_program
from tests.support.processes import run_ranks
from tests.support.training import arguments

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that describes a machine to torch and finds its GPUs."""

    def find(built="13.0", files=(), warning="", gpus=0, **env):
        def is_available():
            if warning:
                warnings.warn(warning, stacklevel=1)
            return gpus > 0

        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        for name in files:
            (tmp_path / name).touch()
        return find_gpus(env, tmp_path)

    return find


@pytest.mark.parametrize(
    ("seen", "parts"),
    [
        ({"built": None}, None),  # a laptop
        ({"built": None, "files": ["nvidiactl", "nvidia-uvm"]}, None),
        ({"built": None, "SLURM_GPUS_ON_NODE": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),  # hidden on purpose
        ({"CUDA_VISIBLE_DEVICES": "-1", "files": ["nvidia0"]}, None),
        ({"gpus": 1, "files": ["nvidia0"]}, None),
        ({}, ["no /dev/nvidia0", "is a CUDA build"]),
        ({"built": None, "files": ["nvidia0"]}, ["is a CPU build: install", "/nvidia0 exists"]),
        ({"built": None, "SLURM_JOB_GPUS": "0,1"}, ["is a CPU build", "SLURM_JOB_GPUS=0,1 is set"]),
        ({"built": None, "CUDA_VISIBLE_DEVICES": "3"}, ["CPU build", "CUDA_VISIBLE_DEVICES=3 is"]),
        (
            {"warning": f"CUDA initialization: {TOO_OLD}. Please update it. (Triggered internally"},
            [f"{TOO_OLD} (torch is built for CUDA 13.0"],
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"},
            ["CUDA_VISIBLE_DEVICES is empty, which hides all GPUs", "SLURM_GPUS_ON_NODE=8 is set"],
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "9", "files": ["nvidia0"]},
            ["CUDA_VISIBLE_DEVICES=9 names no GPU of this machine"],
        ),
        ({"files": ["nvidia0"]}, ["the driver reports no GPU: check nvidia-smi"]),
    ],
    ids=str,
)
def test_a_missing_gpu_is_a_problem_where_one_is_expected(machine, seen, parts):
    gpus = machine(**seen)
    problem = gpus.problem("auto")
    if parts is None:
        assert problem == ""
    for part in parts or ():
        assert part in problem
    assert gpus.problem("cpu") == ""
    assert bool(gpus.problem("cuda")) == (gpus.count == 0)


def rank(number, host="n0", kind="cuda", uuid="", problem=""):
    name = "NVIDIA H100" if kind == "cuda" else "CPU, 8 thread(s) per rank"
    return RankDevice(number, host, kind, name, uuid, problem)


def lacking(number, host):
    return rank(number, host, "cpu", problem="the driver reports no GPU")


def test_ranks_on_one_kind_of_device_agree():
    compare_devices([rank(i, f"n{i // 4}", uuid=f"GPU-{i}") for i in range(8)])
    compare_devices([rank(i, f"n{i}", uuid="GPU-0") for i in range(2)])  # cloned machines
    compare_devices([rank(i) for i in range(4)])  # identity not known
    compare_devices([rank(i, kind="cpu") for i in range(4)])


@pytest.mark.parametrize(
    ("devices", "kind", "lines"),
    [
        (
            [lacking(i, f"n{i // 2}") for i in range(4)],
            UserError,
            ["no GPU can be used:", "  ranks 0-3 on n0, n1: the driver reports no GPU"],
        ),
        (
            [*(rank(i, f"n{i // 4}") for i in range(8)), lacking(8, "n2"), lacking(9, "n2")],
            RunError,
            [
                "ranks have different devices, so that they cannot communicate:",
                "  ranks 8-9 on n2: the driver reports no GPU",
                "  ranks 0-7 on n0, n1: uses NVIDIA H100",
            ],
        ),
        (
            [rank(0), rank(1), rank(2, "n1", "cpu")],
            RunError,
            ["ranks have different", "  rank 2 on n1: uses CPU, 8 thr", "  ranks 0-1 on n0: uses"],
        ),
        (
            [rank(i, "n0", uuid=f"GPU-{i % 4}") for i in range(8)],
            UserError,
            ["ranks 0, 4 on n0 share one GPU (GPU-0): 8 ranks on this machine use 4 GPU(s). Start"],
        ),
    ],
)
def test_ranks_that_differ_are_named(devices, kind, lines):
    with pytest.raises(kind) as error:
        compare_devices(devices)
    found = str(error.value).splitlines()
    assert len(found) >= len(lines)
    for line, start in zip(found, lines, strict=False):
        assert line.startswith(start)


def pretend_gpus(count: int) -> list[int]:
    """Let torch report GPUs; return the list that selected ones are appended to."""
    selected: list[int] = []
    cuda = torch.cuda
    cuda.is_available = lambda: count > 0
    cuda.device_count = lambda: count
    cuda.set_device = selected.append
    cuda.get_device_name = lambda: "NVIDIA H100"
    cuda.get_device_properties = lambda index: type("Properties", (), {"uuid": f"GPU-{index}"})
    cuda.current_device = lambda: selected[-1]
    return selected


class Initialized(Exception):
    """Raised in place of the initialization of process groups, with its arguments."""


def initialize(*_: object, **arguments: object) -> None:
    raise Initialized(arguments)


def raise_busy(index: int) -> None:
    raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nCompile with ...")


def select_devices() -> list[object]:
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup_rank
    from megatron_llmjp.parallel.ranks import single_process

    connections = []
    selected = pretend_gpus(4)
    torch.cuda.is_available = lambda: (
        not connections.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
    )
    chosen = [setup_rank("auto", local_rank) for local_rank in (0, 3, 6)]
    process_groups.dist.init_process_group = initialize
    config = parse(["--config", "laptop-gpt2", "--vocab-size", "100"]).config
    with pytest.raises(Initialized) as error:
        process_groups.initialize(config, single_process(), chosen[-1])
    bound = str(error.value.args[0]["device_id"])
    torch.cuda.set_device = raise_busy
    busy = setup_rank("auto", 0).problem
    return [selected, chosen[1].uuid, chosen[1].name, connections, busy, bound]


def test_a_rank_selects_the_gpu_of_its_number():
    """The driver's variables are set before the first CUDA call; groups are bound to the GPU."""
    selected, uuid, name, connections, busy, bound = run_ranks(select_devices, 1)[0]
    assert (selected, uuid, name) == ([0, 3, 2], "GPU-3", "NVIDIA H100")
    assert set(connections) == {"1"}
    assert busy == "GPU 0 of 4 cannot be used: CUDA error: all CUDA-capable devices are busy"
    assert bound == "cuda:2"


def use_the_cpu() -> list[object]:
    import importlib.util

    from megatron_llmjp.parallel.device import setup, setup_rank

    torch.version.cuda = "13.0"
    pretend_gpus(8)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    device = setup_rank("cpu", 0)
    hidden = [importlib.util.find_spec(name) for name in ("transformer_engine", "apex")]
    return [device.kind, setup().kind, hidden, os.environ["CUDA_VISIBLE_DEVICES"]]


def test_the_cpu_can_be_forced():
    """No library may use a GPU, nor its kernels, in such a process."""
    assert run_ranks(use_the_cpu, 1)[0] == ["cpu", "cpu", [None, None], ""]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folds = write_folds(tmp_path_factory.mktemp("folds"), (3,))
    return arguments("laptop-llama", folds, "--eval-iters", 0)


GRANTED = {"SLURM_GPUS_ON_NODE": "2"}


def test_a_run_without_its_gpus_is_refused(words):
    program, env = ROOT / "pretrain_gpt.py", {**os.environ, **GRANTED}
    done = run_program(program, *words, "--nproc-per-node", "2", env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no GPU can be used:\n  ranks 0-1 on ")
    assert done.stderr.count("error:") == 1 and "--device cpu" in done.stderr
    dry = run_program(program, *words, "--dry-run", env=env)
    assert dry.returncode == 0 and "note: a run on this machine would be refused: " in dry.stderr
    forced = run_program(program, *words, "--device", "cpu", env=env)
    assert forced.returncode == 0, forced.stderr


def grant_to_rank_1() -> None:
    if os.environ.get("RANK") == "1":
        os.environ.update(GRANTED)


def be_mixed_run(words: list[str]) -> None:
    be_program([str(ROOT / "pretrain_gpt.py"), *words], partial(grant_to_rank_1))


def test_a_rank_without_its_gpu_is_named(words, tmp_path: Path):
    """The rank that is wrong is not the one that prints."""
    run = Fork(be_mixed_run, [*words, "--nproc-per-node", "2", "--save", str(tmp_path / "save")])
    assert run.wait() == 1
    lines = run.stderr.splitlines()
    assert len(lines) == 4, run.stderr
    assert lines[0].startswith("error: ranks have different devices")
    assert lines[1].startswith("  rank 1 on ") and "SLURM_GPUS_ON_NODE=2" in lines[1]
    assert lines[2].startswith("  rank 0 on ") and "uses CPU" in lines[2]
    assert not (tmp_path / "save").exists()
