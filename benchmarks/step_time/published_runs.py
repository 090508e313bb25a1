"""Published runs of ``published_runs.yaml``, reduced to seconds per step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_llmjp.config.loading import ConfigLayers, build_config, read_config, replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.flops import flops_by_part
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.speed.step_time import RunLoad, run_load
from megatron_llmjp.estimate.speed.step_work import Software
from megatron_llmjp.estimate.speed.target_gpu import TargetGpu, resolve_gpu

RUNS = Path(__file__).with_name("published_runs.yaml")
PRESETS = {"gpt": "laptop-gpt2", "llama": "laptop-llama"}
"""Presets with the fields of an architecture that do not affect the size."""
UNSET = ("kv_channels", "num_query_groups", "ffn_hidden_size", "max_position_embeddings")
"""Fields that take their defaults unless a run sets them."""
SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class PublishedRun:
    """One run."""

    group: str
    name: str
    gpu: TargetGpu
    seconds: float
    """Per step."""
    load: RunLoad
    fitted: bool
    """Whether the parameters are fitted to it; False for GPU types that are only predicted."""


def load_runs() -> list[PublishedRun]:
    """Read all published runs."""
    groups = yaml.safe_load(RUNS.read_text(encoding="utf-8"))["groups"]
    return [run for group in groups for run in _runs(group)]


def _runs(group: dict[str, Any]) -> Iterator[PublishedRun]:
    for run in group["runs"]:
        values = dict.fromkeys(UNSET) | group.get("config", {}) | run.get("config", {})
        config = replace_fields(_base(run.get("architecture", group["architecture"])), **values)
        gpu = _gpu(group, config)
        seconds = seconds_per_step(group["formula"], run["figure"], config, run["gpus"], gpu)
        layout = make_layout(config, run["gpus"])
        yield PublishedRun(
            group["name"],
            f"{run['name']}, {run['gpus']} {group['gpu']}",
            gpu,
            seconds,
            run_load(config, layout, Software(**group["software"])),
            group.get("fitted", True),
        )


def _base(architecture: str) -> Config:
    layers = ConfigLayers()
    read_config(PRESETS[architecture], layers)
    return build_config(layers)


def _gpu(group: dict[str, Any], config: Config) -> TargetGpu:
    machine = PlannedMachine(1, group["gpu"], None, group.get("gpus_per_node", 8))
    gpu = resolve_gpu(config, machine)
    network = group.get("network_bandwidth")
    return replace(gpu, network_bandwidth=float(network)) if network else gpu


def seconds_per_step(
    formula: str, figure: float, config: Config, gpus: int, gpu: TargetGpu
) -> float:
    """Return the seconds per step that a published figure stands for.

    Args:
        formula: what the figure is, and how its FLOPs were counted.
        figure: as published.
        config: the run's configuration.
        gpus: their number.
        gpu: their type.

    Raises:
        ValueError: the formula is unknown.
    """
    batch, s = config.training.global_batch_size, config.data.seq_length
    if formula == "seconds":
        return figure
    if formula == "steps_per_day":
        return SECONDS_PER_DAY / figure
    if formula == "tokens_per_second":
        return batch * s / figure
    if formula == "days_for_300b_tokens":
        return figure * SECONDS_PER_DAY * batch * s / 300e9
    rate = gpus * (figure / 100 * gpu.peak if formula.endswith("mfu") else figure * 1e12)
    if formula == "tflops_with_recompute":
        return batch * _flops_with_recompute(config) / rate
    if formula in ("tflops", "mfu"):
        # Megatron-LM counted all attention scores until core 0.12.
        parts = flops_by_part(config)
        return batch * (parts.total + parts.attention_scores) / rate
    raise ValueError(f"unknown formula {formula}")


def _flops_with_recompute(config: Config) -> float:
    """Return the FLOPs of a sample with full recompute (Narayanan et al., 2021, equation 3)."""
    s, layers, h = config.data.seq_length, config.model.num_layers, config.model.hidden_size
    vocabulary = config.padded_vocab_size / (16 * layers * h)
    return 96 * s * layers * h**2 * (1 + s / (6 * h) + vocabulary)
