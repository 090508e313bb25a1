"""Scaling over numbers of GPUs: batch sizes, costs, and the named limits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.run_estimate import RunEstimate, estimate_run
from megatron_llmjp.estimate.search.scaling import (
    ScalingPoint,
    fastest_of_fewer,
    format_pareto,
    format_scaling,
    scale_run,
    scaling_numbers,
)
from megatron_llmjp.estimate.search.scaling_limits import growth, largest_overhead
from megatron_llmjp.estimate.search.scaling_plot import plot_scaling
from megatron_llmjp.estimate.speed.step_time import TERMS, StepTime
from tests.estimate.test_flops import preset

TOKENS = 300 * 24 * 512
CONFIG = preset(
    "laptop-gpt2", num_layers=8, seq_length=512, vocab_size=1000, global_batch_size=24,
    train_iters=300, bf16=True,
)  # fmt: skip


def machine(*gpus: int, **values) -> PlannedMachine:
    return PlannedMachine(gpus[-1], "H100", None, 8, scaling=gpus, **values)


def test_strong_and_weak_scaling():
    """The same batch on all GPUs, or per GPU; the run keeps its tokens."""
    found = scale_run(CONFIG, machine(2, 4, 8, gpu_hour_price=3.0, gpu_power=1000.0))
    assert found.tokens == TOKENS and not found.is_assumed
    assert [point.global_batch_size for point in found.strong] == [24, 24, 24]
    assert [point.global_batch_size for point in found.weak] == [24, 48, 96]
    for point in (*found.strong, *found.weak):
        assert point.best is not None
        assert point.best.estimate.layout.world_size == point.gpus
        steps = TOKENS / (point.global_batch_size * 512)
        assert point.seconds == pytest.approx(steps * point.best.seconds)


def test_costs_and_json():
    """GPU hours by price, and by power in MWh."""
    priced = machine(2, 4, gpu_hour_price=3.0, gpu_power=1000.0)
    found = scale_run(CONFIG, priced)
    numbers = json.loads(json.dumps(scaling_numbers(found, priced, CONFIG)))
    for point, row in zip(found.strong, numbers["strong"], strict=True):
        hours = point.gpus * point.seconds / 3600
        assert row["cost"] == pytest.approx(3.0 * hours)
        assert row["megawatt_hours"] == pytest.approx(hours / 1000)
        assert row["best"]["step_seconds"] == point.best.seconds
    header = format_scaling(found, priced).splitlines()[2].split()
    assert header == ["GPUs", "layout", "step", "MFU", "tokens/s", "days", "cost", "MWh", "limit"]
    plain = format_scaling(scale_run(CONFIG, machine(2)), machine(2))
    assert "cost" not in plain and "weak scaling" not in plain


def test_the_plot(tmp_path):
    found = scale_run(CONFIG, machine(2, 4, 8))
    plot_scaling(found, tmp_path / "scaling.svg")
    assert "<svg" in (tmp_path / "scaling.svg").read_text()
    with pytest.raises(UserError, match=r"--scaling-plot .*scaling\.doc"):
        plot_scaling(found, tmp_path / "scaling.doc")


def test_numbers_of_gpus_without_a_layout():
    """A batch of 24 cannot be divided over 7 replicas, and 172b does not fit into 8 GPUs."""
    found = scale_run(CONFIG, machine(2, 7))
    assert found.strong[1].best is None
    assert found.strong[1].limit == (
        "global batch size 24 is not divisible by the replicas of any layout"
    )
    large = preset("llm-jp-3-172b", global_batch_size=8)
    found = scale_run(large, machine(8))
    assert (found.strong[0].best, found.strong[0].limit) == (None, "no layout fits into memory")
    lines = format_scaling(found, machine(8)).splitlines()
    assert lines[3].split() == ["8", "no", "layout", "fits", "into", "memory"]


def test_tensor_parallelism_leaves_the_node_where_nothing_else_fits():
    """A batch of one on 16 GPUs in nodes of 4, with 4 layers: only TP x PP 4 or CP are left."""
    values = {"num_layers": 1, "num_query_groups": 16, "num_attention_heads": 16}
    config = preset("laptop-llama", global_batch_size=1, seq_length=512, vocab_size=1000, **values)
    found = scale_run(config, PlannedMachine(16, "H100", None, 4, scaling=(4, 16)))
    few, many = (point.best.estimate.layout for point in found.strong)
    assert (few.tp, many.tp) == (4, 16)
    assert "TP beyond a node" not in found.strong[0].limit
    assert "TP beyond a node" in found.strong[1].limit


def test_days_by_number_of_gpus():
    """Numbers of GPUs that are slower than fewer are omitted: the Pareto front."""

    def point(gpus: int, seconds: float | None) -> ScalingPoint:
        return ScalingPoint(gpus, 24, None, seconds, "")

    points = [point(*p) for p in ((1, 9.0), (2, None), (4, 5.0), (6, 5.0), (8, 7.0), (16, 1.0))]
    assert [p.gpus for p in fastest_of_fewer(points)] == [1, 4, 16]
    found = scale_run(CONFIG, machine(2, 4, 8), weak=False)
    assert found.weak == ()
    lines = format_pareto(found, machine(2, 4, 8)).splitlines()
    assert lines[0] == "days for 3.69M tokens by number of GPUs, same batch"
    assert [line.split()[0] for line in lines[2:-1]] == [
        str(p.gpus) for p in fastest_of_fewer(found.strong)
    ]


def test_the_length_is_assumed_if_unknown():
    found = scale_run(replace_fields(CONFIG, train_iters=None), machine(2))
    assert found.is_assumed and found.tokens == 10**12
    assert "1.00T tokens (assumed:" in format_scaling(found, machine(2))


def times(config: Config, gpus: int, **terms: float) -> RunEstimate:
    estimate = estimate_run(config, PlannedMachine(gpus, "H100"))
    time = StepTime(**{**dict.fromkeys(TERMS, 0.0), **terms})
    return replace(estimate, step_time=time, step_seconds=time.total)


def test_limits_are_the_terms_that_cost_more_gpu_time():
    """Per sample: twice the GPUs should take half the time."""
    config = replace_fields(CONFIG, micro_batch_size=2)
    few = times(config, 2, products=8.0, bubble=1.0, data=1.0)
    assert largest_overhead(few) in (
        "pipeline bubble 10%", "data-parallel communication 10%",
    )  # fmt: skip
    assert largest_overhead(times(config, 2, products=8.0)) == "computing"
    assert growth(times(config, 4, products=4.0, bubble=0.5, data=0.5), few) == (
        "as efficient as on 2 GPUs"
    )
    many = times(config, 4, products=4.5, bubble=1.5, data=0.5, kernels=0.25)
    assert growth(many, few) == "+35% GPU time: pipeline bubble +20%, matrix products +10%"
    double = replace_fields(config, global_batch_size=48)
    assert growth(times(double, 4, products=8.0, bubble=1.0, data=1.5), few) == (
        "+5% GPU time: data-parallel communication +5%"
    )
    alone = replace_fields(config, global_batch_size=16, micro_batch_size=8)
    assert growth(times(alone, 2, products=8.0), few) == (
        "+20% GPU time: matrix products +40% (only 1 micro-batch per replica and step)"
    )


def test_limits_of_172b():
    """On more GPUs than its batch feeds, GPUs idle and exchange more."""
    found = scale_run(preset("llm-jp-3-172b"), machine(512, 4096))
    few, many = (point.best for point in found.strong)
    assert few is not None and many is not None
    assert many.estimate.mfu < few.estimate.mfu
    assert found.strong[1].limit.startswith("+") and "% GPU time: " in found.strong[1].limit
