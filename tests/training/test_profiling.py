"""Profilers and reports on memory: traces of a run, an out-of-memory error, refused options."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.errors import UserError
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.out_of_memory import (
    NamedMemory,
    describe_memory,
    explain_out_of_memory,
    is_out_of_memory,
)
from megatron_llmjp.training.profiling import check_profiling
from tests.support.datasets import write_folds
from tests.support.processes import run_ranks
from tests.support.training import DISTRIBUTED, Job, arguments, train_on_rank

CPU = Device("cpu", "gloo", "CPU, 1 thread(s) per rank")
GPU = Device("cuda", "nccl", "NVIDIA H100 80GB HBM3")
PROFILE = ("--profile", "--use-pytorch-profiler", "--profile-step-start", 2,
           "--profile-step-end", 4, "--profile-ranks", 1)  # fmt: skip


def train_and_run_out_of_memory(jobs, folder):
    """Run all jobs; in the last one the second micro-batch of the third step finds no memory."""
    from megatron_llmjp.training import train_step

    train_on_rank(jobs[:-1], folder)
    losses, calls = train_step.masked_loss, []

    def fails(*given):
        calls.append(torch.zeros(1000, 777))
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return losses(*given)

    with mock.patch.object(train_step, "masked_loss", fails), pytest.raises(AssertionError) as oom:
        train_on_rank(jobs[-1:], folder)
    return str(oom.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    folds = write_folds(folder, (5,))
    jobs = [
        Job("profiled", (0, 2), tuple(arguments("laptop-llama", folds, *PROFILE, eval_iters=0))),
        Job("failed", (0, 2), tuple(arguments("laptop-llama", folds, *DISTRIBUTED))),
    ]
    plain = [{**asdict(job), "flags": [str(flag) for flag in job.flags]} for job in jobs]
    errors = run_ranks(train_and_run_out_of_memory, 2, plain, str(folder))
    return folder, errors


def test_the_trace_has_the_profiled_iterations_of_the_ranks(runs):
    folder, _ = runs
    written = [file.name for file in (folder / "profiled" / "profile").iterdir()]
    assert written == ["rank1.pt.trace.json"]
    trace = json.loads((folder / "profiled" / "profile" / written[0]).read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    steps = {name for name in names if str(name).startswith("ProfilerStep#")}
    assert len(steps) == 2  # iterations 3 and 4
    # forward and backward of each of two micro-batches and two steps, in each of the layers
    assert sum(name == "aten::_fused_rms_norm" or name == "aten::mm" for name in names) >= 16


def test_an_out_of_memory_error_names_the_largest_tensors(runs):
    folder, errors = runs
    assert all("Tried to allocate 2.00 GiB" in error for error in errors)
    lines = (folder / "failed" / "profile" / "out-of-memory-rank0.txt").read_text().splitlines()
    assert lines[0] == "error: rank 0 is out of memory on CPU, 1 thread(s) per rank"
    sizes = dict(part.rsplit(" ", 2)[:2] for part in lines[1].removeprefix("memory: ").split(", "))
    assert list(sizes) == ["parameters", "gradients", "optimizer state", "activations and others"]
    table = [line.split() for line in lines[3:]]
    assert len(table) == 10
    # six tensors of the failing function, then the embedding and its gradient
    assert [row[2:7] for row in table[:6]] == [["float32", "1000", "x", "777", "activations"]] * 6
    assert any("embedding.word_embeddings.weight" in line for line in lines)


def test_memory_by_kind():
    found = [
        NamedMemory("parameters", "embedding", (10, 20), "bfloat16", 400_000_000),
        NamedMemory("parameters", "norm", (20,), "bfloat16", 40),
        NamedMemory("gradients", "embedding", (10, 20), "float32", 800_000_000),
    ]
    lines = describe_memory(found, 5_000_000_000.0)
    assert lines[0] == (
        "memory: parameters 400.0 MB, gradients 800.0 MB, held by autograd and libraries 3.8 GB"
    )
    assert [line.split() for line in lines[2].splitlines()] == [
        ["800.0", "MB", "float32", "10", "x", "20", "gradients:", "embedding"],
        ["400.0", "MB", "bfloat16", "10", "x", "20", "parameters:", "embedding"],
        ["0.0", "MB", "bfloat16", "20", "parameters:", "norm"],
    ]


def test_errors_of_memory():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    for error in (
        found.value,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--use-pytorch-profiler", "use_pytorch_profiler has no effect without profile"),
        ("--profile --record-shapes --profile-step-end 10", "profile_step_end 10 must be above"),
        ("--profile --profile-ranks 0 1 2", r"profile_ranks 2: the run has ranks 0 to 1 \(2 proc"),
        ("--profile --use-pytorch-profiler", "use_pytorch_profiler requires save"),
        ("--record-memory-history", "requires save or memory_snapshot_path"),
        ("--memory-snapshot-path s", "no effect without record_memory_history"),
    ],
)
def test_refused_combinations(flags, problem):
    config = parse(["--config", "laptop-llama", *flags.split()]).config
    with pytest.raises(UserError, match=problem):
        check_config(config, 2)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--profile", "--profile controls nsys, which profiles GPUs; the run is on CPU"),
        ("--nvtx-ranges --record-memory-history", "--nvtx-ranges, --record-memory-history: the"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu(flags, problem):
    config = parse(["--config", "laptop-llama", "--save", "save", *flags.split()]).config
    check_config(config, 1)
    check_profiling(config, GPU)
    with pytest.raises(UserError, match=problem):
        check_profiling(config, CPU)


def test_an_error_of_the_report_does_not_replace_the_error(capsys):
    chunk = SimpleNamespace()  # without parameters
    with pytest.raises(torch.OutOfMemoryError), explain_out_of_memory([chunk], None, CPU, 3, None):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "no report on the memory of rank 3" in capsys.readouterr().err


def test_other_tensors_are_named_by_variable_or_operation(tmp_path):
    weight = torch.ones(300_000, requires_grad=True)

    def forward():
        activations = weight * 3
        kept.append((activations + 1).exp())
        raise torch.OutOfMemoryError("CUDA out of memory")

    kept: list[torch.Tensor] = []
    with pytest.raises(torch.OutOfMemoryError), explain_out_of_memory([], None, CPU, 0, tmp_path):
        forward()
    text = (tmp_path / "out-of-memory-rank0.txt").read_text()
    assert re.search(r"300000 +activations and others: activations in .*forward$", text, re.M)
    assert re.search(r"300000 +activations and others: output of ExpBackward0$", text, re.M)
