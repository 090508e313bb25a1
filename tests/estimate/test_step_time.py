"""Step time: FLOPs against flops.py, times against closed forms, seconds against published runs."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt

import numpy as np
import pytest

from benchmarks.step_time.published_runs import load_runs, seconds_per_step
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.flops import flops_by_part
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.speed.fitted_step_time import ACCURACY, FITTED
from megatron_llmjp.estimate.speed.step_time import TERMS, RunLoad, StepTime, run_load, step_time
from megatron_llmjp.estimate.speed.step_work import Software, layer_work, matrix_product
from megatron_llmjp.estimate.speed.target_gpu import TargetGpu, resolve_gpu
from tests.estimate.test_flops import preset

GPU = TargetGpu("X100", 80e9, 1e15, 8, 4e12, 5e11, 4e10)
SOFTWARE = Software()
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
MODEL = {
    "num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 8,
    "seq_length": 512, "vocab_size": 1000, "micro_batch_size": 1, "global_batch_size": 64,
    "bf16": True,
}  # fmt: skip


def load(world: int, software: Software = SOFTWARE, name: str = "laptop-gpt2", **values) -> RunLoad:
    config = preset(name, **{**MODEL, **values})
    return run_load(config, make_layout(config, world), software)


def flops(found: RunLoad, kind: str) -> float:
    """Sum the FLOPs of a sample over all stages and tensor-parallel ranks."""
    total = sum(getattr(stage.work, kind).flops for stage in found.stages)
    return total * found.layout.tp * found.layout.cp / found.config.training.micro_batch_size


@pytest.mark.parametrize("name", ["laptop-gpt2", "laptop-llama", "laptop-gpt-neox"])
@pytest.mark.parametrize(("t", "p", "b"), [(1, 1, 1), (2, 2, 1), (1, 4, 4)])
def test_flops_are_those_of_the_model(name, t, p, b):
    """Which are compared with torch's count (test_flops.py), for any layout and micro-batch."""
    layout = {"tensor_model_parallel_size": t, "pipeline_model_parallel_size": p}
    found = load(8, name=name, num_query_groups=4, micro_batch_size=b, **layout)
    parts = flops_by_part(found.config)
    layers = parts.attention_projections + parts.feed_forward
    assert flops(found, "products") == pytest.approx(layers)
    assert flops(found, "output_products") == pytest.approx(parts.logits)
    # FlashAttention: 2 causal products forward, 5 backward, of which the model counts 6.
    assert flops(found, "attention") == pytest.approx(parts.attention_scores * 7 / 6)
    unfused = load(8, Software(flash_attention=False), name, micro_batch_size=b, **layout)
    assert flops(unfused, "attention") == pytest.approx(2 * parts.attention_scores)
    assert flops(found, "recomputed_products") == 0


@pytest.mark.parametrize(("values", "share"), [
    (FULL, 1.0), ({**FULL, "recompute_method": "block", "recompute_num_layers": 3}, 0.75),
])  # fmt: skip
def test_recomputation_repeats_the_forward_pass(values, share):
    found = load(2, pipeline_model_parallel_size=2, **values)
    parts = flops_by_part(found.config)
    forward = (parts.attention_projections + parts.feed_forward) / 3
    assert flops(found, "recomputed_products") == pytest.approx(share * forward)
    assert flops(found, "recomputed_attention") == pytest.approx(share * parts.attention_scores / 3)
    selective = load(2, pipeline_model_parallel_size=2, recompute_granularity="selective")
    assert flops(selective, "recomputed_products") == 0
    assert flops(selective, "recomputed_attention") == pytest.approx(parts.attention_scores / 3)


def test_traffic_of_a_product_and_of_unfused_scores():
    assert matrix_product(3, 5, 7, 2).flops == 2 * 3 * 5 * 7
    assert matrix_product(3, 5, 7, 2).bytes == 2 * (3 * 7 + 7 * 5 + 3 * 5)
    found = load(1)
    work = layer_work(found.config, found.layout, Software(flash_attention=False))
    assert work.attention.total.bytes == 32 * 512 * 512 * 8
    # Forward and backward: activations of 4 matrices, and weights with fp32 accumulators.
    weights = 12 * 1024**2
    activations = 512 * (1024 + 3072 + 1024 + 1024 + 1024 + 4096 + 4096 + 1024)
    assert work.products.total.bytes == 3 * 2 * activations + weights * (2 + 2 + 2 * 4)


def equal_stages(p: int, v: int, m: int) -> RunLoad:
    """Return a pipeline whose stages all do the same."""
    found = load(
        p, pipeline_model_parallel_size=p, global_batch_size=m,
        virtual_pipeline_model_parallel_size=v if v > 1 else None, num_layers=24,
    )  # fmt: skip
    return replace(found, stages=(found.stages[1],) * p)


@pytest.mark.parametrize(("p", "v", "m"), [(4, 1, 8), (4, 3, 8), (8, 1, 64), (2, 6, 2)])
def test_the_bubble_of_equal_stages(p, v, m):
    """(p - 1) / (v m) of the time without it (Narayanan et al., 2021, section 2.2)."""
    found = equal_stages(p, v, m)
    times = step_time(found, GPU)
    once = sum(
        getattr(times, name) for name in TERMS if name not in ("bubble", "data", "optimizer")
    )
    assert times.stragglers == 0  # one replica
    assert times.bubble == pytest.approx(once * (p - 1) / (v * m))


@pytest.mark.parametrize("gpus", [8, 64])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_messages_take_their_bytes_by_bandwidth(gpus, sequence_parallel):
    found = load(
        gpus, tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
        sequence_parallel=sequence_parallel, use_distributed_optimizer=True,
    )  # fmt: skip
    times = step_time(found, GPU)
    sent = found.stages[1].sent  # with the output layer
    link, network = 5e11 * FITTED.link, 4e10 * 0.9
    assert times.tensor == pytest.approx(sent.tensor / link)
    assert times.pipeline == pytest.approx(sent.pipeline / (link if gpus == 8 else network))
    # Four ranks of a node share a data-parallel ring.
    ring = link if gpus == 8 else min(link, 4 * network)
    data = (sent.gradients + sent.parameters) / ring
    assert times.data == pytest.approx(data + sent.embedding / network)
    n = gpus // 4
    parameters = found.stages[1].parameters
    assert times.optimizer == pytest.approx(parameters * (30 / n + 8) / (4e12 * 0.85))
    rest = times.total - times.stragglers
    assert times.stragglers == pytest.approx(rest * FITTED.stragglers * sqrt(2 * log(n)))


@pytest.mark.parametrize(("documents", "passes"), [(False, 3), (True, 2)])
def test_context_parallel_messages(documents, passes):
    """Keys and values to three other ranks; the ring is hidden behind the scores, if they last."""
    found = load(4, context_parallel_size=4, reset_attention_mask=documents)
    one = found.config.training.micro_batch_size * 512 // 4 * 2 * 1024 * 2
    layers = found.config.model.num_layers
    assert found.stages[0].sent.context == found.layout.micro_batches * layers * passes * 3 * one
    times, slow = (step_time(found, gpu) for gpu in (GPU, replace(GPU, link_bandwidth=1e8)))
    hidden = 0.0 if documents else times.attention
    for time, link in ((times, 5e11), (slow, 1e8)):
        alone = found.stages[0].sent.context / (link * FITTED.link)
        assert time.context == pytest.approx(max(0.0, alone - hidden))


def test_overlapped_communication():
    """Gradients behind two thirds of a micro-batch's time; never less than 5 % remain."""
    slow = replace(GPU, network_bandwidth=1e8)
    whole = step_time(load(64, use_distributed_optimizer=True), slow)
    overlapped = load(
        64, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    found = step_time(overlapped, slow)
    once = sum(getattr(found, name) for name in TERMS if name not in (
        "bubble", "data", "optimizer", "stragglers",
    ))  # fmt: skip
    assert whole.data - found.data == pytest.approx(once)
    fast = step_time(overlapped, replace(GPU, network_bandwidth=1e12))
    sent = overlapped.stages[0].sent
    ring = 5e11 * FITTED.link
    assert fast.data == pytest.approx(0.05 * (sent.gradients + sent.parameters) / ring)


def test_context_parallelism_and_groups_across_nodes():
    """Ring attention is hidden behind the scores, unless the network is slow."""
    values = {"name": "laptop-llama", "context_parallel_size": 2, "num_query_groups": 8}
    hidden = step_time(load(2, **values), replace(GPU, link_bandwidth=1e14))
    assert hidden.context == 0
    found = load(2, **values)
    slow = step_time(found, replace(GPU, per_node=1, network_bandwidth=1e6))
    size = 3 * 256 * 2 * 1024 * 2 * 8 * 64  # tokens, keys and values, bytes, layers, samples
    assert slow.context + slow.attention == pytest.approx(size / (1e6 * 0.9))
    across = step_time(load(2, tensor_model_parallel_size=2), replace(GPU, per_node=1))
    within = step_time(load(2, tensor_model_parallel_size=2), GPU)
    assert across.tensor / within.tensor == pytest.approx(5e11 * FITTED.link / (4e10 * 0.9))


def test_terms_are_sorted_and_named():
    terms = StepTime(1.0, 3.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0)
    assert terms.sorted_terms() == [("attention", 3.0), ("output", 2.0), ("products", 1.0)]
    assert terms.total == 6.0 and set(TERMS) == set(vars(terms))


def test_published_figures_in_seconds():
    """Narayanan et al. (2021), table 2: teraFLOP/s, and the days that 300B tokens take."""
    runs = {run.name: run for run in load_runs() if run.group == "SC21 table 2"}
    days = {"175B, 384 A100": 84, "175B, 768 A100": 43, "175B, 1536 A100": 23,
            "530B, 560 A100": 156, "530B, 1120 A100": 80, "530B, 2240 A100": 42}  # fmt: skip
    for name, expected in days.items():
        run = runs[name]
        tokens = run.load.config.training.global_batch_size * 2048
        # Their equation 4 omits attention scores and logits, some 3 %.
        assert 300e9 / tokens * run.seconds / 86_400 == pytest.approx(expected, rel=0.05)
    # Jiang et al. (2024), table 2, gives seconds and MFU.
    (run,) = (run for run in load_runs() if run.name == "12288, 12288 A100")
    seconds = seconds_per_step("mfu", 41.2, run.load.config, 12288, run.gpu)
    assert seconds == pytest.approx(run.seconds, rel=0.03)


def test_published_runs_are_predicted():
    """With the committed parameters; the errors in ACCURACY are those without the run itself."""
    runs = [run for run in load_runs() if run.fitted]
    assert len(runs) == ACCURACY.runs >= 25
    errors = np.array([step_time(r.load, r.gpu).total / r.seconds - 1 for r in runs])
    assert np.median(abs(errors)) <= ACCURACY.median <= 0.05
    assert np.quantile(abs(errors), 0.9) <= ACCURACY.percentile_90 <= 0.10
    assert 0.8 < ACCURACY.low < 1.0 < ACCURACY.high < 1.25
    others = [run for run in load_runs() if not run.fitted]
    errors = np.array([step_time(r.load, r.gpu).total / r.seconds - 1 for r in others])
    assert np.all(abs(errors) < 0.2)


def machine(gpu: str, **numbers: float) -> PlannedMachine:
    return PlannedMachine(8, gpu, numbers.pop("memory", None), 8, **numbers)


def test_gpus_by_name_and_by_numbers():
    config = replace_fields(preset("laptop-llama"), bf16=True)
    found = resolve_gpu(config, machine("NVIDIA A100-SXM4-40GB"))
    assert (found.memory, found.memory_bandwidth, found.products) == (40e9, 1555e9, "ampere")
    found = resolve_gpu(config, machine("NVIDIA GeForce RTX 4090"))
    assert (found.memory, found.memory_bandwidth, found.peak) == (24e9, 1008e9, 165.2e12)
    found = resolve_gpu(config, machine("H100", network_bandwidth=12.5e9))
    assert (found.network_bandwidth, found.link_bandwidth) == (12.5e9, 450e9)
    with pytest.raises(UserError, match="--gpu-peak-tflops --gpu-memory --memory-bandwidth --link"):
        resolve_gpu(config, machine("X1"))
    numbers = {"memory": 1e11, "memory_bandwidth": 2e12, "link_bandwidth": 3e11}
    found = resolve_gpu(replace_fields(config, gpu_peak_tflops=500.0), machine("X1", **numbers))
    assert found == TargetGpu("X1", 1e11, 5e14, 8, 2e12, 3e11, 50e9)
