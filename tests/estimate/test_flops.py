"""FLOPs compared with torch's FlopCounterMode in a real step, and with closed forms."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_llmjp.config.loading import ConfigLayers, build_config, read_config, replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.flops import (
    flops_by_part,
    flops_per_sample,
    step_flops,
    tflops_per_device,
)
from megatron_llmjp.estimate.speed.gpus import find_gpu, peak_tflops
from tests.support.processes import run_ranks

STYLES = ("laptop-llama", "laptop-gpt2", "laptop-gpt-neox")
VARIANTS: list[dict[str, Any]] = [{"kv_channels": 24}, {"recompute_granularity": "full"}]
"""Heads whose total size differs from the hidden size; full recomputation."""
RECOMPUTE = {"recompute_method": "uniform", "recompute_num_layers": 1}
BATCH = 3


def preset(name: str, **values: Any) -> Config:
    layers = ConfigLayers()
    read_config(name, layers)
    return replace_fields(build_config(layers), **values)


def small(name: str, **values: Any) -> Config:
    if "recompute_granularity" in values:
        values = {**values, **RECOMPUTE}
    return preset(name, num_layers=2, vocab_size=99, seq_length=32, **values)


CASES = [(style, {}) for style in STYLES] + [("laptop-llama", variant) for variant in VARIANTS]


def count(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, int]]:
    """Return torch's FLOPs of a forward and backward pass: attention scores, and the rest."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process

    device, counts = setup(), []
    for number, (name, values) in enumerate(cases):
        config = small(name, **values)
        if number == 0:
            process_groups.initialize(config, single_process(), device)
        (model,) = build_model(config, device)
        tokens = torch.zeros(BATCH, config.data.seq_length, dtype=torch.long)
        # The math backend, because the FLOPs counted for fused kernels depend on the device.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens, tokens, None, labels=tokens).sum().backward()
        operations = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        scores = sum(n for op, n in operations.items() if "bmm" in op)
        counts.append({"matrices": sum(operations.values()) - scores, "scores": scores})
    return counts


def test_counts_of_a_real_step():
    (counts,) = run_ranks(count, 1, CASES)
    for (name, values), found in zip(CASES, counts, strict=True):
        parts = flops_by_part(small(name, **values))
        layers = parts.attention_projections + parts.feed_forward
        recompute = "recompute_granularity" in values  # torch counts the layers' forward pass twice
        matrices = layers * 4 // 3 if recompute else layers
        scores = parts.attention_scores * 4 // 3 if recompute else parts.attention_scores
        assert found["matrices"] == BATCH * (matrices + parts.logits), (name, values)
        # torch computes the whole square of the scores; the causal mask uses half.
        assert found["scores"] == BATCH * 2 * scores, (name, values)


def test_closed_forms():
    """Six FLOPs per token and parameter in a matrix product, plus attention scores."""
    config = preset("llm-jp-3-172b")
    parts = flops_by_part(config)
    norms = (2 * 96 + 1) * 12288
    in_layers = 169_947_181_056 - norms
    assert parts.attention_projections + parts.feed_forward == 6 * 4096 * in_layers
    assert parts.logits == 6 * 4096 * 12288 * config.padded_vocab_size
    assert parts.attention_scores == 6 * 4096 * 4096 * 12288 * 96
    assert step_flops(config, 1728) == 1728 * flops_per_sample(config)
    # Published: about 2,000 steps per day on 512 H100.
    speed = tflops_per_device(config, 1728, 86400 / 2000, 512)
    assert 0.33 < speed / (peak_tflops("NVIDIA H100 80GB HBM3", "bf16") or 0) < 0.40


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA GB200", "bf16", 2500),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA H200", "fp32", 67),
        ("cpu", "fp32", None),
    ],
)
def test_peaks(name, dtype, peak):
    assert peak_tflops(name, dtype) == peak


def test_longer_gpu_names_are_matched_first():
    gpu = find_gpu("NVIDIA H200 NVL")
    assert gpu is not None and gpu.name == "H200 NVL"
    gpu = find_gpu("NVIDIA L40S")
    assert gpu is not None and gpu.name == "L40S"
