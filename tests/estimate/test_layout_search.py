"""Suggested layouts: the published layouts fit, and the suggested flags select a valid layout."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.layout_report import format_layout
from megatron_llmjp.estimate.run_estimate import estimate_run
from megatron_llmjp.estimate.search import layout_candidates, layout_table
from megatron_llmjp.estimate.search.layout_search import LayoutCandidate, search_layouts
from megatron_llmjp.estimate.search.layout_table import format_candidates, layout_flags
from megatron_llmjp.estimate.speed.step_time import TERMS, StepTime
from tests.estimate.test_flops import preset
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
    "pretrain_llm-jp-4-8b": "TP 1 x PP 1 x DP 128",
    "pretrain_llm-jp-4-32b": "TP 4 x PP 1 x DP 32",
    "pretrain_llm-jp-4-32b-a3b": "TP 1 x PP 1 x DP 128, EP 4",
    "pretrain_llm-jp-4-291b-a27b": "TP 1 x PP 6 x VP 2 x DP 48, EP 8",
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
    if found[0].given or found[0].seconds > 0.995 * given[0].seconds:
        assert "is the fastest" in text or "less than 0.5% less time" in text
        return
    assert "less time: " in text and " s less" in text.split("less time: ")[1]
    suggested = parse([*words, *layout_flags(found[0].estimate.config, config).split()]).config
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


def times(total: float, **others: float) -> StepTime:
    """Return times that are 0 except for the matrix products, which make up the total."""
    parts = dict.fromkeys(TERMS, 0.0) | others
    return StepTime(**{**parts, "products": total - sum(others.values())})


def candidate(config, machine, time: StepTime, given: bool) -> LayoutCandidate:
    estimate = estimate_run(config, machine)
    return LayoutCandidate(replace(estimate, step_seconds=time.total, step_time=time), given)


def test_the_table_of_layouts():
    """Six layouts, and the given one; the fastest of each TP and PP."""
    machine = PlannedMachine(8, "H100", 40e9, 8)
    values = {"num_layers": 8, "vocab_size": 1000, "bf16": True, "use_distributed_optimizer": True}
    found = []
    for number, (t, p, b) in enumerate(
        [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 4, 1), (2, 1, 1), (2, 2, 1), (2, 4, 1), (4, 1, 1)]
    ):
        config = preset(
            "laptop-gpt2", tensor_model_parallel_size=t, pipeline_model_parallel_size=p,
            micro_batch_size=b, global_batch_size=64, sequence_parallel=t > 1, **values,
        )  # fmt: skip
        step = times(1.0 + number, tensor=0.5, data=0.25 if number else 0.245, pipeline=number / 10)
        found.append(candidate(config, machine, step, given=number == 7))
    lines = format_candidates(found[7].estimate.config, machine, found).splitlines()
    assert lines[0] == (
        "8 H100 with 40 GB, global batch 64, "
        f"{config.data.seq_length} tokens: 8 layouts fit into 95% of the memory, which is "
        "predicted within 5%; the fastest of each TP, PP and CP, in estimated seconds"
    )
    assert lines[1].split() == [
        "layout", "micro-batch", "recompute", "memory", "MFU", "step", "compute", "bubble", "TP",
        "comm", "PP", "comm", "DP", "comm", "optimizer",
    ]  # fmt: skip
    shown = [line.split("  ")[0] for line in lines[2:9]]
    assert shown == [
        "TP 1 x PP 1 x DP 8", "TP 1 x PP 2 x DP 4", "TP 1 x PP 4 x DP 2", "TP 2 x PP 1 x DP 4",
        "TP 2 x PP 2 x DP 2", "TP 2 x PP 4 x DP 1", "TP 4 x PP 1 x DP 2 (given)",
    ]  # fmt: skip
    assert lines[2].split()[-4:] == ["1.00", "0.26", "0.50", "0.24"]
    assert lines[8].split()[-5:] == ["8.00", "6.55", "0.50", "0.70", "0.25"]
    assert lines[9] == (
        "the given layout fits and is number 8 of 8; the fastest takes 88% less time: compute "
        "6.29 s less, PP comm 0.70 s less"
    )
    assert lines[10] == (
        "flags of the fastest: --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 "
        "--micro-batch-size 1 --use-distributed-optimizer --no-sequence-parallel"
    )
    assert len(lines) == 11
    lines = format_candidates(config, machine, found[:7]).splitlines()
    assert lines[8] == "the given layout is invalid or does not fit"
    assert lines[7].startswith("TP 2 x PP 4")
    more = replace_fields(
        found[5].estimate.config, recompute_granularity="full", recompute_method="uniform",
        recompute_num_layers=1, sequence_parallel=True, virtual_pipeline_model_parallel_size=2,
    )  # fmt: skip
    alone = [candidate(more, machine, times(1.0), given=True)]
    lines = format_candidates(more, machine, alone).splitlines()
    assert lines[2].startswith("TP 2 x PP 2 x VP 2 x DP 2 (given)            1  all layers")
    assert lines[3] == "the given layout fits and is the fastest by this estimate"
    assert lines[4] == (
        "flags of the fastest: --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--micro-batch-size 1 --use-distributed-optimizer --sequence-parallel "
        "--virtual-pipeline-model-parallel-size 2 --recompute-granularity full --recompute-method "
        "uniform --recompute-num-layers 1"
    )


def test_the_reasons_are_sorted_and_small_ones_omitted():
    best, given = times(8.0, bubble=1.0, data=2.0, tensor=1.0), times(10.0, bubble=3.5, data=1.0)
    best = replace(best, pipeline=0.04)
    machine, config = PlannedMachine(1, "H100", None, 8), preset("laptop-gpt2", vocab_size=99)
    given = candidate(config, machine, given, given=True)
    assert layout_table._reasons(candidate(config, machine, best, False), given) == (
        "bubble 2.50 s less, compute 1.50 s less, TP comm 1.00 s more, DP comm 1.00 s more"
    )
    more = candidate(config, machine, replace(best, pipeline=0.05), False)
    assert "PP comm 0.05 s more" in layout_table._reasons(more, given)


def recomputation(parallel):
    if parallel.recompute_granularity is None:
        return None
    assert parallel.recompute_granularity == "full"
    if parallel.recompute_method == "block":
        return parallel.recompute_num_layers
    assert (parallel.recompute_method, parallel.recompute_num_layers) == ("uniform", 1)
    return "all"


@pytest.mark.parametrize(("recompute", "length"), [
    (None, 2047), ("selective", 2048), ("full", 8192),
])  # fmt: skip
def test_searched_layouts(recompute, length):
    """All that divide 8 GPUs, 6 layers and a batch of 16; within a node of 4 GPUs.

    Context-parallel ranks have 1,024 tokens or more, in micro-batches of one sample.
    """
    full = {"recompute_method": "uniform", "recompute_num_layers": 1}
    config = preset(
        "laptop-llama", num_layers=6, global_batch_size=16, vocab_size=1000, seq_length=length,
        recompute_granularity=recompute, **(full if recompute == "full" else {}),
    )  # fmt: skip
    found = list(layout_candidates.candidates(config, PlannedMachine(8, "H100", None, 4)))
    blocks = {1: set(), 2: {1}, 3: {1, 2}, 6: {1, 3, 4}}  # a quarter, half, three quarters
    expected = {
        (t, p, v, c, b, again)
        for t, p, c, replicas in itertools.product(
            (1, 2, 4), range(1, 9), (1, 2, 4, 8), range(1, 9)
        )
        if t * p * c * replicas == 8 and (c == 1 or length // c >= 1024)
        for v in (None, 2, 3, 4, 5, 6)
        for chunks in (p * (v or 1),)
        # Even, or with the embedding and the output layer as one layer each.
        if v is None or p > 1
        if 6 % chunks == 0 or 8 % chunks == 0
        for b in ((1, 2, 4, 8) if c == 1 else (1,))
        if 16 % (replicas * b) == 0
        for again in {None, "all"} | blocks[(6 if 6 % chunks == 0 else 8) // chunks]
    }
    keys = [
        (
            c.parallel.tensor_model_parallel_size,
            c.parallel.pipeline_model_parallel_size,
            c.parallel.virtual_pipeline_model_parallel_size,
            c.parallel.context_parallel_size,
            c.training.micro_batch_size,
            recomputation(c.parallel),
        )
        for c in found
    ]
    assert set(keys) == expected and len(keys) == len(expected)
    assert {key[1] for key in keys} == {1, 2, 4, 8}  # 3 and 6 do not divide 8
    for c in found:
        parallel = c.parallel
        assert parallel.sequence_parallel == (parallel.tensor_model_parallel_size > 1)
        assert parallel.use_distributed_optimizer
        chunks = parallel.pipeline_model_parallel_size * (
            parallel.virtual_pipeline_model_parallel_size or 1
        )
        assert parallel.account_for_loss_in_pipeline_split == (6 % chunks > 0)
        assert parallel.account_for_embedding_in_pipeline_split == (6 % chunks > 0)


def test_one_layer_less_on_the_last_stage():
    """Seven layers and the output layer are eight."""
    config = preset("laptop-llama", num_layers=7, global_batch_size=16, vocab_size=1000)
    machine = PlannedMachine(8, "H100", None, 8)
    found = {
        c.parallel.pipeline_model_parallel_size: c.parallel
        for c in layout_candidates.candidates(config, machine)
    }
    assert sorted(found) == [1, 2, 4, 8]
    for size in (2, 4, 8):
        assert found[size].account_for_loss_in_pipeline_split
        assert not found[size].account_for_embedding_in_pipeline_split


def test_options_that_are_tried_on_the_fastest_layouts():
    config = preset(
        "laptop-llama", tensor_model_parallel_size=2, sequence_parallel=True,
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True,
    )  # fmt: skip
    found = [c.parallel for c in layout_candidates.variants(config, 4)]
    assert [p.recompute_granularity for p in found] == ["selective", None, None]
    assert [p.sequence_parallel for p in found] == [True, False, True]
    assert [p.use_distributed_optimizer for p in found] == [True, True, False]
    assert [p.overlap_param_gather for p in found] == [True, True, False]
    alone = replace_fields(config, tensor_model_parallel_size=1, sequence_parallel=False)
    assert len(list(layout_candidates.variants(alone, 1))) == 1
    flags = layout_flags(replace_fields(config, use_distributed_optimizer=False), config)
    assert "--no-use-distributed-optimizer" in flags and "--no-overlap-param-gather" in flags


def test_a_split_for_one_pipeline_size_is_unset():
    words = ["--config", "llm-jp-3-13b", "--suggest-layout", "--gpus", "128"]
    config, machine, _ = command = search(words)
    config = replace_fields(config, decoder_first_pipeline_num_layers=19)
    text = format_candidates(config, machine, search_layouts(config, machine))
    assert "--decoder-first-pipeline-num-layers none" in text.splitlines()[-1]
    assert " none" not in format_candidates(*command)


def test_one_of_several_chunks_has_the_output_layer():
    values = {"num_layers": 8, "vocab_size": 1000, "bf16": True, "global_batch_size": 64}
    seconds = []
    for chunks in (None, 4):
        config = preset(
            "laptop-gpt2", pipeline_model_parallel_size=2, micro_batch_size=1,
            virtual_pipeline_model_parallel_size=chunks, **values,
        )  # fmt: skip
        estimate = estimate_run(config, PlannedMachine(8, "H100", None, 8))
        assert estimate.step_time is not None
        seconds.append(estimate.step_time.output)
    assert seconds[0] == seconds[1] > 0
