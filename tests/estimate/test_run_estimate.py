"""Text of an estimate, and the length of a run, from written-out numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.estimate.communication import CommunicationVolume
from megatron_llmjp.estimate.estimate_report import format_estimate
from megatron_llmjp.estimate.failure_report import FailureForecast
from megatron_llmjp.estimate.failures import FailureModel
from megatron_llmjp.estimate.flops import step_flops
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.memory import RankMemory
from megatron_llmjp.estimate.run_estimate import (
    RunEstimate,
    RunLength,
    estimate_run,
    run_length_without_data,
)
from megatron_llmjp.estimate.speed.fitted_step_time import ACCURACY
from megatron_llmjp.estimate.speed.step_time import StepTime
from megatron_llmjp.estimate.speed.target_gpu import TargetGpu
from tests.estimate.test_flops import preset

GB = 10**9
FORECAST = FailureForecast(FailureModel(36_000.0, 20.0, 30.0, 600.0, 300.0), "given", "measured")


def memory(factor: int) -> RankMemory:
    return RankMemory(*(factor * kind * GB for kind in (1, 2, 3, 4, 5, 6)))


VALUES = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "micro_batch_size": 3,
    "global_batch_size": 24,
    "num_layers": 8,
    "seq_length": 512,
    "vocab_size": 1000,
    "save_interval": 40,
    "non_persistent_save_minutes": 0,
}
CONFIG = preset("laptop-gpt2", **VALUES)
PEAK = step_flops(CONFIG, 24) / (0.5 * 16 * 0.4)
"""At which 0.5 s per step on 16 GPUs are 40% MFU."""
ESTIMATE = RunEstimate(
    config=CONFIG,
    gpu=TargetGpu("X100", 65 * GB, PEAK, 4, 1e12, 1e11, 1e10),
    layout=make_layout(CONFIG, 16),
    memory=(memory(1), memory(2)),
    communication=(
        CommunicationVolume(1 * GB, 2 * GB, 3 * GB, 0, 4 * GB),
        CommunicationVolume(5 * GB, 6 * GB, 7 * GB, 0, 8 * GB),
    ),
    parameters=(1_234_567, 7_654_321),
    step_seconds=0.5,
    failures=FORECAST,
    length=RunLength(100_000, 2_400_000, "as configured"),
)
REPORT = """\
16 X100: TP 2 x PP 2 x VP 2 x DP 4; 2 micro-batches of size 3 per replica and step
1,783,040 parameters, 1,651,968 without embeddings; padded vocabulary size 1,024

stage  layers     parameters  ranks  nodes and their replicas
0      E+1-2 5-6   1,234,567  0-7    n0 d0-1  n1 d2-3
1      3-4 7-8+L   7,654,321  8-15   n2 d0-1  n3 d2-3
one replica of a stage uses 2 adjacent GPUs (TP 2); parameters are per GPU
E: embedding, L: output layer and loss

memory per GPU   stage 0   stage 1
  weights        1.00 GB   2.00 GB
  gradients      2.00 GB   4.00 GB
  optimizer      3.00 GB   6.00 GB
  activations    4.00 GB   8.00 GB
  logits         5.00 GB  10.00 GB
  buffers        6.00 GB  12.00 GB
  total         21.00 GB  42.00 GB
fits: 42.0 GB + 2.5 GB for CUDA and NCCL = 68% of 65 GB

sent per GPU and step     stage 0  stage 1
  tensor (within a node)  1.00 GB  5.00 GB
  pipeline (network)      2.00 GB  6.00 GB
  gradients (network)     3.00 GB  7.00 GB
  embedding (network)     4.00 GB  8.00 GB

step             12,288 tokens, 164.28 BFLOPs, pipeline bubble 20.0%
at 40% MFU       0.50 s per step; per day 172,800 steps and 2.12B tokens
run              100,000 steps (as configured), 1.23B tokens: 0.6 days
checkpoints      2,500 x 21.4 MB written, 2,500 kept (53.5 GB)
each rank saves  23.0 MB, through page-locked buffers of its two largest tensors
published        87,870 steps for its ten folds, on 96 A100 40 GB: 1.08B tokens

failures       one in 10 h (given)
a save         blocks training for 20 s, is complete after 30 s (measured)
a restart      10 min after 5 min in the queue
save interval  20 s as configured; 19.8 min (2,373 steps) loses least
with failures  1.19 days, 2.8 failures: saves 0.58, repeated steps 0.00, restarts 0.02, queue 0.01
best interval  0.61 days"""


def test_the_whole_report():
    assert format_estimate(ESTIMATE, "llm-jp-13b-v1.0") == REPORT


def test_a_report_without_length():
    lines = format_estimate(replace(ESTIMATE, length=None)).splitlines()
    expected = REPORT.splitlines()
    assert lines[:-8] == expected[:-11]
    assert lines[-8:] == [
        "run              unknown length: set --train-iters or --fold-file",
        "checkpoints      21.4 MB each",
        expected[-9],
        "",
        *expected[-6:-3],
        "save interval  19.8 min (2,373 steps) loses least",
    ]
    once = replace(ESTIMATE, config=replace_fields(CONFIG, save_interval=None))
    assert "checkpoints      1 x 21.4 MB, at the end" in format_estimate(once).splitlines()
    # 100,000 steps of 0.5 s, saved after 7,199 at the latest.
    config = replace_fields(CONFIG, save_interval=None, non_persistent_save_minutes=60)
    hourly = format_estimate(replace(ESTIMATE, config=config)).splitlines()
    size = "21.4 MB"
    expected = f"14 x {size} written, 1 kept ({size}), and up to 2 others during the run"
    assert f"checkpoints      {expected}" in hourly


TIMES = StepTime(0.2, 0.02, 0.03, 0.0, 0.04, 0.01, 0.05, 0.0, 0.002, bubble=0.1, data=0.048)


def test_terms_and_intervals_of_a_predicted_step():
    """Largest first, and the spread of the published runs on step and days."""
    predicted = replace(ESTIMATE, step_time=TIMES)
    lines = format_estimate(predicted).splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("predicted seconds"))
    assert [" ".join(line.split()) for line in lines[first : first + 4]] == [
        "predicted seconds per step 0.500 100.0%",
        "matrix products 0.200 40.0%",
        "pipeline bubble 0.100 20.0%",
        "tensor-parallel communication 0.050 10.0%",
    ]
    assert lines[first + 10].startswith(f"{0.5 * ACCURACY.low:.2f} to {0.5 * ACCURACY.high:.2f} s ")
    assert lines[first + 11] == ("no run on X100 is among them: the error may be larger")
    days = 100_000 * 0.5 / 86_400
    (run,) = (line for line in lines if line.startswith("run "))
    spread = f"({days * ACCURACY.low:.1f} to {days * ACCURACY.high:.1f})"
    assert run.endswith(f"1.23B tokens: {days:.1f} days {spread}")
    assert predicted.error_range == (ACCURACY.low, ACCURACY.high)
    assert ESTIMATE.error_range == (1.0, 1.0)


def test_a_given_mfu_replaces_the_prediction():
    config = preset("llm-jp-3-13b", padded_vocab_size=99_584)
    assumed = estimate_run(config, PlannedMachine(256, "H100", None, 8, mfu=0.38))
    assert assumed.step_time is None and assumed.mfu == pytest.approx(0.38)
    assert "predicted" not in format_estimate(assumed)
    predicted = estimate_run(config, PlannedMachine(256, "H100", None, 8))
    assert predicted.step_time is not None
    assert predicted.step_seconds == predicted.step_time.total


def report(world: int, per_node: int, memory_bytes: float = 65 * GB, **values: Any) -> list[str]:
    """Return the lines for another layout, of as many equal stages."""
    config = replace_fields(CONFIG, **values)
    layout = make_layout(config, world)
    found = RunEstimate(
        config=config,
        gpu=TargetGpu("X100", memory_bytes, PEAK, per_node, 1e12, 1e11, 1e10),
        layout=layout,
        memory=(memory(1),) * layout.pp,
        communication=(CommunicationVolume(GB, 0, 0 if world == 2 else GB, 0, 0),) * layout.pp,
        parameters=(10,) * layout.pp,
        step_seconds=0.5,
        failures=FORECAST,
    )
    return format_estimate(found).splitlines()


ONE = {"virtual_pipeline_model_parallel_size": None, "pipeline_model_parallel_size": 1}


def test_one_gpu():
    config = replace_fields(CONFIG, **ONE, tensor_model_parallel_size=1)
    alone = replace(
        ESTIMATE,
        config=config,
        layout=make_layout(config, 1),
        memory=(memory(1),),
        communication=(CommunicationVolume(0, 0, 0, 0, 0),),
    )
    lines = format_estimate(alone).splitlines()
    assert lines[0] == "1 X100: TP 1 x PP 1 x DP 1; 8 micro-batches of size 3 per replica and step"
    assert lines[4] == "0      E+1-8+L   1,234,567  0      n0:0 d0"
    assert lines[5] == "one replica of a stage uses 1 GPU; parameters are per GPU"
    assert "no communication on one GPU" in lines


@pytest.mark.parametrize(
    ("world", "per_node", "values", "expected"),
    [
        (8, 4, {"micro_batch_size": 6}, [
            "8 X100: TP 2 x PP 1 x DP 4; 1 micro-batch of size 6 per replica and step",
            "0      E+1-8+L          10  0-7    n0 d0-1  n1 d2-3",
            "  tensor (within a node)  1.00 GB",
            "  gradients (network)     1.00 GB",
            "fits: 21.0 GB + 2.5 GB for CUDA and NCCL = 36% of 65 GB",
        ]),
        (8, 8, {}, ["  gradients (within a node)  1.00 GB"]),
        (16, 8, {"context_parallel_size": 2}, [
            "16 X100: TP 2 x PP 1 x CP 2 x DP 4; 2 micro-batches of size 3 per replica and step",
            "one replica of a stage uses 4 adjacent GPUs (TP 2 x CP 2); parameters are per GPU",
            "  tensor (within a node)  1.00 GB",
            "  gradients (network)     1.00 GB",
        ]),
        (4, 2, {"tensor_model_parallel_size": 4}, [
            "0      E+1-8+L          10  0-3    n0 d0  n1 d0",
            "tensor-parallel groups span nodes: they communicate over the network",
            "  tensor (network)     1.00 GB",
        ]),
        (16, 4, {}, ["0      E+1-8+L          10  0-15   n0 d0-1  n1 d2-3  n2 d4-5  n3 d6-7"]),
        (24, 4, {"micro_batch_size": 1}, [
            "0      E+1-8+L          10  0-23   n0 d0-1  n1 d2-3  ...  n5 d10-11",
        ]),
        (8, 8, {"pipeline_model_parallel_size": 2}, [
            "0      E+1-4           10  0-3    n0:0-3 d0-1",
            "1      5-8+L           10  4-7    n0:4-7 d0-1",
        ]),
    ],
)  # fmt: skip
def test_other_layouts(world, per_node, values, expected):
    lines = report(world, per_node, **{**ONE, **values})
    assert [line for line in expected if line not in lines] == []


def test_the_stages_shown():
    """The first, the middle and the last; of memory the first, the worst and the last."""
    values = {**ONE, "pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 1}
    lines = report(4, 4, 23.4 * GB, **values)
    assert "memory per GPU   stage 0   stage 3" in lines
    assert "sent per GPU and step        stage 0  stage 2  stage 3" in lines
    assert "  tensor (within a node)     1.00 GB  1.00 GB  1.00 GB" in lines
    assert "  gradients (within a node)  1.00 GB  1.00 GB  1.00 GB" in lines
    assert "DOES NOT FIT: 21.0 GB + 2.5 GB for CUDA and NCCL = 100% of 23 GB" in lines
    assert "fits: 21.0 GB + 2.5 GB for CUDA and NCCL = 100% of 24 GB" in report(
        4, 4, 23.5 * GB, **values
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train_iters": 30}, RunLength(30, 720, "as configured")),
        ({"train_samples": 250}, RunLength(10, 240, "as configured")),
        ({"train_tokens": 24 * 512 * 7}, RunLength(7, 168, "as configured")),
        ({"lr_decay_iters": 40}, RunLength(40, 960, "until the end of the learning-rate decay")),
        ({"lr_decay_iters": 40, "train_iters": 30}, RunLength(30, 720, "as configured")),
        ({}, None),
    ],
)
def test_lengths_without_data(values, expected):
    assert run_length_without_data(replace_fields(CONFIG, **values)) == expected


@pytest.mark.parametrize(("name", "share"), [("llm-jp-3-172b", "34%"), ("llm-jp-3-13b", "32%")])
def test_published_speeds(name, share):
    """MFU from the steps per day: 6 FLOPs per parameter and token give nearly as much."""
    config = preset(name, padded_vocab_size=99_584)
    estimate = estimate_run(config, PlannedMachine(512, "H100", None, 8, mfu=0.38))
    (line,) = (x for x in format_estimate(estimate, name).splitlines() if "published" in x)
    assert line.endswith(f" H100: {share} MFU")
    steps, gpus = {"llm-jp-3-172b": (2_000, 512), "llm-jp-3-13b": (20_000, 256)}[name]
    tokens = steps * config.training.global_batch_size * config.data.seq_length
    parameters = sum(estimate.parameters) * config.parallel.tensor_model_parallel_size
    least = 6 * parameters * tokens / 86_400 / gpus / 989.4e12
    assert least < float(share[:-1]) / 100 < 1.2 * least


def test_stages_without_layers_recompute_nothing():
    """Embedding and output layer alone on their stages."""
    config = preset(
        "laptop-gpt2", pipeline_model_parallel_size=3, pipeline_model_parallel_layout="E|tttt|L",
        vocab_size=1000, recompute_granularity="full", recompute_method="uniform",
        recompute_num_layers=1,
    )  # fmt: skip
    estimate = estimate_run(config, PlannedMachine(3, "H100"))
    assert [memory.activations > 0 for memory in estimate.memory] == [True, True, True]
    assert estimate.step_time is not None and estimate.step_time.recompute > 0
