"""Parts of `make gpu` on the fake GPU machine: devices, and what they wait for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.parts import find_part
from benchmarks.gpu.results import Context, Results
from benchmarks.gpu.scale import TINY
from tests.gpu.machine.library import why_missing
from tests.gpu.machine.process import run_on_machine

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def run_part(machine: Any, name: str, folder: str) -> dict[str, Any]:
    """Run a part on the machine; the samples have no values, like all tensors."""
    import torch

    from megatron_llmjp.training import run_setup
    from tests.gpu.training_run import GRADIENT_NORM, Samples

    def open_datasets(run: Any, ranks: Any) -> Any:
        indices: Any = SimpleNamespace(close=lambda: None)
        return run_setup.RunDatasets(Samples(run.config, 1000), {}, indices)

    run_setup.open_datasets = open_datasets
    torch.cuda.set_sync_debug_mode = lambda mode: None
    torch.cuda.nccl.version = lambda: (2, 28, 9)
    machine.waits.answers[GRADIENT_NORM] = 2.0
    results = Results(Path(folder) / "results.json")
    scale = replace(TINY, shrink=(*TINY.shrink, "--num-workers", "0"))
    find_part(name).run(Context("cuda", scale, Path(folder), results))
    return {
        "tables": results.tables,
        "waits": sorted({(w.operation, w.place.split("/")[-1]) for w in machine.waits.take()}),
        "devices": sorted(machine.waits.devices),
    }


def test_a_step_waits_for_the_gradient_norm_only(tmp_path):
    found = run_on_machine(run_part, "step-1.8b", str(tmp_path))
    assert found["devices"] == ["cpu", "cuda:0"]
    speeds = found["tables"]["speed and memory"]
    assert [row["micro-batch size"] for row in speeds] == list(TINY.micro_batch_sizes)
    assert all(row["fits 80 GB"] == "yes" and row["MFU"].endswith("%") for row in speeds)
    assert [tuple(wait) for wait in found["waits"]] == [
        ("all_gather_object", "__init__.py:_get_param_groups"),
        ("copy cpu to cuda", "optimizer.py:__init__"),
        ("item", "clip_grads.py:get_grad_norm_fp32"),
        ("torch.cuda.synchronize", "session.py:synchronize"),  # the clock's
    ]


def test_both_sides_of_the_comparison_compute_on_the_gpu(tmp_path):
    found = run_on_machine(run_part, "compare-1.8b", str(tmp_path))
    assert found["devices"] == ["cpu", "cuda:0"]
    assert found["tables"]["speeds"][0]["ours MFU"].endswith("%")
    # transformers' step waits for nothing.
    assert {place for _, place in found["waits"] if place.startswith("compare.py")} == {
        "compare.py:their_step"  # its batches, before the first step
    }


def test_the_facts_of_a_gpu(tmp_path):
    found = run_on_machine(run_part, "machine", str(tmp_path))
    facts = {row["fact"]: row["value"] for row in found["tables"]["machine"]}
    assert facts["GPU"] == "NVIDIA H100 80GB HBM3"
    assert "TFLOP/s" in facts["bf16 product of 8192 x 8192"]
    assert found["devices"] == ["cpu", "cuda:0"]
