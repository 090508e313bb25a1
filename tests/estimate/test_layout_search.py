"""Suggested layouts: the published layouts fit, and the suggested flags select a valid layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_llmjp.config.flags import parse
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.layout_search import (
    estimate_step_times,
    format_candidates,
    layout_flags,
    search_layouts,
)
from megatron_llmjp.estimate.run_estimate import estimate_run, format_layout
from tests.estimate.test_meta_build import SCRIPTS, words_of

PUBLISHED = {
    "pretrain_llm-jp-1.3b-v1.0": "TP 1 x PP 1 x DP 96",
    "pretrain_llm-jp-13b-v1.0": "TP 1 x PP 8 x DP 12",
    "pretrain_llm-jp-13b-v2.0": "TP 2 x PP 4 x DP 16",
    "pretrain_llm-jp-3-150m": "TP 1 x PP 1 x DP 64",
    "pretrain_llm-jp-3-440m": "TP 1 x PP 1 x DP 32",
    "pretrain_llm-jp-3-980m": "TP 1 x PP 1 x DP 32",
    "pretrain_llm-jp-3-1.8b": "TP 1 x PP 1 x DP 32",
    "pretrain_llm-jp-3-3.7b": "TP 1 x PP 1 x DP 128",
    "pretrain_llm-jp-3-7.2b": "TP 2 x PP 2 x DP 32",
    "pretrain_llm-jp-3-13b": "TP 2 x PP 2 x DP 32",
    "pretrain_llm-jp-3-172b": "TP 4 x PP 16 x DP 8",
    "pretrain_rinna-japanese-gpt-neox-3.6b": "TP 1 x PP 1 x DP 32",
}


def search(words):
    command = parse(words)
    return command.config, command.machine, search_layouts(command.config, command.machine)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_published_layouts_fit(script):
    """Each on the GPUs of its Slurm script."""
    words = words_of(script, "--suggest-layout")
    config, machine, found = search(words)
    given = [candidate for candidate in found if candidate.given]
    assert [format_layout(s.estimate.layout) for s in given] == [PUBLISHED[script.stem]]
    text = format_candidates(config, machine, found)
    assert f"{PUBLISHED[script.stem]} (given)" in text
    if found[0].given:
        assert "is the fastest" in text
        return
    assert "less time: " in text and " s less" in text.split("less time: ")[1]
    suggested = parse([*words, *layout_flags(found[0].estimate.config).split()]).config
    assert make_layout(suggested, machine.world_size) == found[0].estimate.layout
    assert suggested.parallel == found[0].estimate.config.parallel


def test_gpu_memory_limits_the_layouts():
    """Fewer layouts fit into 40 GB than into 80 GB, and none for the 172b on 8 GPUs."""
    words = ["--config", "llm-jp-3-13b", "--suggest-layout", "--gpus", "96"]
    words += ["--global-batch-size", "960"]
    _, _, large = search(words)
    _, _, small = search([*words, "--gpu-memory", "40GB"])
    assert 0 < len(small) < len(large)
    words = ["--config", "llm-jp-3-172b", "--suggest-layout", "--gpus", "8"]
    config, machine, found = search(words)
    assert found == [] and "no layout fits" in format_candidates(config, machine, found)


def test_memory_of_cuda_and_a_margin_are_reserved():
    """2.5 GB for CUDA and NCCL; suggested layouts leave 5 %, the given one may use everything."""
    words = ["--config", "llm-jp-3-13b", "--suggest-layout", "--gpus", "96"]
    words += ["--global-batch-size", "960"]
    config, machine, found = search(words)
    given = next(s for s in found if s.given).estimate
    needed = max(memory.total for memory in given.memory) + 2_500_000_000
    assert given.memory_fraction == needed / 80e9

    full = replace(machine, gpu_memory=float(needed))
    assert estimate_run(config, full).fits
    assert not estimate_run(config, replace(full, gpu_memory=needed - 1.0)).fits
    fractions = {s.given: s.estimate.memory_fraction for s in search_layouts(config, full)}
    assert fractions[True] == 1.0
    other = next(s.estimate for s in found if not s.given)
    needed = max(memory.total for memory in other.memory) + 2_500_000_000
    for share, suggested in ((0.96, False), (0.94, True)):
        searched = search_layouts(config, replace(machine, gpu_memory=needed / share))
        assert (other.config in [s.estimate.config for s in searched if not s.given]) == suggested
        assert all(s.estimate.memory_fraction <= (1.0 if s.given else 0.95) for s in searched)


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_the_bubble_shrinks_with_interleaving(chunks):
    """(p - 1) / (v m) of the time without it (Narayanan et al., 2021, section 2.2)."""
    words = ["--config", "llm-jp-3-13b", "--suggest-layout", "--gpus", "96"]
    words += ["--global-batch-size", "960", "--pipeline-model-parallel-size", "4"]
    words += ["--tensor-model-parallel-size", "1", "--no-sequence-parallel"]
    words += ["--virtual-pipeline-model-parallel-size", str(chunks)] if chunks > 1 else []
    command = parse(words)
    times = estimate_step_times(estimate_run(command.config, command.machine))
    micro_batches = 960 // command.config.training.micro_batch_size // (96 // 4)
    busy = times.compute + times.tensor + times.pipeline
    assert times.bubble == pytest.approx(busy * 3 / (chunks * micro_batches))
