"""The metrics of a training run: stored name, meaning, value, log line and plot of each.

Trainer, log line, ``metrics.jsonl``, TensorBoard, Weights & Biases, report and ``run_status`` take
metrics from this registry. To add one, register a :class:`Metric` here; its value is computed from
the measurements in :class:`~megatron_llmjp.interval_stats.IntervalStats`.

``metrics.jsonl`` has one JSON object per line. Every record has :data:`ITERATION`; a record with
:data:`LM_LOSS` (null if no step had a loss) is a log interval of training, a record with keys of
:data:`VALIDATION_LOSS` a validation, a record with :data:`EVENT` an event.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megatron_llmjp.formatting import format_count
from megatron_llmjp.interval_stats import IntervalStats
from megatron_llmjp.metric_panels import (
    BATCH_SIZE_PANEL,
    EXPERT_LOAD_PANEL,
    EXPERT_LOSS_PANEL,
    FIRST_PANELS,
    GRADIENT_NORM_PANEL,
    LEARNING_RATE_PANEL,
    LOSS_SCALE_PANEL,
    MEMORY_PANEL,
    PARAMETER_NORM_PANEL,
    RANK_TIMES_PANEL,
    THROUGHPUT_PANEL,
    Z_LOSS_PANEL,
    Panel,
)

METRICS_FILE = "metrics.jsonl"
"""Name of the metrics file in the save folder."""
EXPERT_TOKENS_FILE = "expert_tokens.json"
"""Name of the file with the tokens of each expert in the save folder."""
EXPERT_TOKENS = "tokens"
"""Its field of the tokens of each expert in a log interval, by layer."""

ITERATION, CONSUMED_SAMPLES, EVENT, FOLD = "iteration", "consumed samples", "event", "fold"
"""Fields of records that are not metrics."""

HARDWARE = "hardware"
"""Field of the event ``start`` with the devices of all ranks."""

SLOWEST_HOST = "slowest host"
"""Field of a log interval with the hosts of :data:`SLOWEST_RANK`."""


@dataclass(frozen=True)
class Metric:
    """A metric of training, with one value per log interval."""

    name: str
    """Name in ``metrics.jsonl``, TensorBoard and Weights & Biases."""
    description: str
    """Entry of the table in docs/training.md."""
    value: Callable[[IntervalStats], float | None]
    """Computes the value; None if the run does not have this metric."""
    log_line: Callable[[float], str] | None = None
    """Formats the value for the log line; an empty string omits it."""
    panel: Panel | None = None
    """Plot that shows the metric."""
    label: str = ""
    """Legend entry, in a plot of several metrics."""
    scale: float = 1.0
    """Factor for plotted values."""


@dataclass(frozen=True)
class MetricGroup:
    """A metric with one value per dataset or validation set, stored as ``PREFIX/NAME``."""

    prefix: str
    description: str

    def key(self, name: str) -> str:
        """Return the stored name of the metric of a dataset or validation set."""
        return f"{self.prefix}/{name}"

    def names(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the datasets or validation sets among the keys of a record, by key."""
        start = f"{self.prefix}/"
        return {key: key.removeprefix(start) for key in keys if key.startswith(start)}


METRICS: dict[str, Metric] = {}
"""All metrics by name, in the order of the log line."""

GROUPS: dict[str, MetricGroup] = {}
"""All metrics with one value per dataset or validation set, by prefix."""


def register_metric(metric: Metric) -> Metric:
    """Add a metric to the registry and return it."""
    METRICS[metric.name] = metric
    return metric


def register_metric_group(group: MetricGroup) -> MetricGroup:
    """Add a metric of datasets or validation sets to the registry and return it."""
    GROUPS[group.prefix] = group
    return group


def panels() -> dict[Panel, list[Metric]]:
    """Return the panels of the report with their metrics."""
    found: dict[Panel, list[Metric]] = {panel: [] for panel in FIRST_PANELS}
    for metric in METRICS.values():
        if metric.panel is not None:
            found.setdefault(metric.panel, []).append(metric)
    return found


def interval_values(stats: IntervalStats) -> dict[str, float]:
    """Return the values of all metrics that the run has, by name."""
    values = {name: metric.value(stats) for name, metric in METRICS.items()}
    return {name: value for name, value in values.items() if value is not None}


def log_line_parts(values: Mapping[str, float]) -> list[str]:
    """Return the parts of the log line, in the order of :data:`METRICS`."""
    parts = [
        metric.log_line(values[name])
        for name, metric in METRICS.items()
        if metric.log_line is not None and name in values
    ]
    return [part for part in parts if part]


def perplexity(loss: float) -> float:
    """Return e^loss, with the loss clamped to 20 as in Megatron-LM; NaN for NaN."""
    return math.exp(min(loss, 20.0))


def _format(form: str) -> Callable[[float], str]:
    return form.format


def _if_finite(form: str) -> Callable[[float], str]:
    return lambda value: form.format(value) if math.isfinite(value) else ""


def _if_nonzero(form: str) -> Callable[[float], str]:
    return lambda value: form.format(value) if value else ""


def format_tflops(value: float) -> str:
    """Format TFLOP/s; empty below 1, as of small models on a CPU, where they say nothing."""
    return f"{value:.1f}" if value >= 1.0 else ""


def _mfu(stats: IntervalStats) -> float | None:
    return None if stats.peak_tflops is None else stats.tflops_per_gpu / stats.peak_tflops


CONSUMED_TOKENS = register_metric(
    Metric(
        "consumed tokens",
        "tokens since the start of the run",
        lambda s: s.consumed_samples * s.sequence_length,
        lambda tokens: f"consumed tokens: {format_count(tokens)}",
    )
)
SECONDS_PER_ITERATION = register_metric(
    Metric(
        "seconds per iteration",
        "mean over the interval, without validations and saves",
        lambda s: s.seconds / s.steps,
        lambda seconds: f"elapsed time per iteration (ms): {seconds * 1000:.1f}",
    )
)
TFLOPS_PER_GPU = register_metric(
    Metric(
        "TFLOP/s per GPU",
        "over the interval, by Megatron-LM's formula",
        lambda s: s.tflops_per_gpu,
        lambda v: f"throughput per GPU (TFLOP/s/GPU): {v:.1f}" if format_tflops(v) else "",
    )
)
MFU = register_metric(
    Metric("MFU", "model FLOP/s utilization, from 0 to 1", _mfu, _if_finite("MFU: {:.1%}"))
)
TOKENS_PER_SECOND = register_metric(
    Metric(
        "tokens per second",
        "over the interval, of all ranks",
        lambda s: s.samples_per_second * s.sequence_length,
        lambda speed: f"tokens/s: {format_count(speed)}",
        THROUGHPUT_PANEL,
    )
)
LEARNING_RATE = register_metric(
    Metric(
        "learning rate",
        "of the interval's last step",
        lambda s: s.learning_rate,
        _format("learning rate: {:.6E}"),
        LEARNING_RATE_PANEL,
    )
)
GLOBAL_BATCH_SIZE = register_metric(
    Metric(
        "global batch size",
        "of the interval's last step, in samples",
        lambda s: s.global_batch_size,
        _format("global batch size: {:5d}"),
        BATCH_SIZE_PANEL,
    )
)
LM_LOSS = register_metric(
    Metric(
        "lm loss",
        "cross entropy in nats per token over the interval, without the z-loss",
        lambda s: s.lm_loss,
        _if_finite("lm loss: {:.6E}"),
    )
)
Z_LOSS = register_metric(
    Metric(
        "z loss",
        "z-loss per token over the interval",
        lambda s: s.z_loss,
        _if_finite("z loss: {:.6E}"),
        Z_LOSS_PANEL,
    )
)
LOAD_BALANCING_LOSS = register_metric(
    Metric(
        "load balancing loss",
        "of the routers, mean over layers with experts, without its coefficient; 1 is balanced",
        lambda s: None if s.experts is None else s.experts.load_balancing_loss,
        _format("load balancing loss: {:.6E}"),
        EXPERT_LOSS_PANEL,
        label="load balancing",
    )
)
ROUTER_Z_LOSS = register_metric(
    Metric(
        "router z loss",
        "of the routers, mean over layers with experts, without its coefficient",
        lambda s: None if s.experts is None else s.experts.router_z_loss,
        _format("router z loss: {:.6E}"),
        EXPERT_LOSS_PANEL,
        label="z-loss",
    )
)
EXPERT_LOAD = register_metric(
    Metric(
        "expert load",
        "tokens of the busiest expert by the mean, maximum of all layers; 1 is balanced",
        lambda s: None if s.experts is None else max(s.experts.load.values()),
        _format("expert load: {:.2f}"),
        EXPERT_LOAD_PANEL,
    )
)
DROPPED_TOKENS = register_metric(
    Metric(
        "dropped tokens",
        "fraction of the choices of experts above `--moe-expert-capacity-factor`",
        lambda s: None if s.experts is None else s.experts.dropped,
        _format("dropped tokens: {:.2%}"),
    )
)
LOSS_SCALE = register_metric(
    Metric(
        "loss scale",
        "after the interval's last step",
        lambda s: s.loss_scale,
        _format("loss scale: {:.1f}"),
        LOSS_SCALE_PANEL,
    )
)
GRAD_NORM = register_metric(
    Metric(
        "grad norm",
        "of the interval's last step, before clipping",
        lambda s: s.grad_norm,
        _format("grad norm: {:.3f}"),
        GRADIENT_NORM_PANEL,
    )
)
PARAMS_NORM = register_metric(
    Metric(
        "params norm",
        "after the interval's last step; unless `--no-log-params-norm`",
        lambda s: s.params_norm,
        _if_finite("params norm: {:.3f}"),
        PARAMETER_NORM_PANEL,
    )
)
SKIPPED_ITERATIONS = register_metric(
    Metric(
        "skipped iterations",
        "steps of the interval that were not applied",
        lambda s: s.skipped,
        _format("number of skipped iterations: {:3d}"),
    )
)
NAN_ITERATIONS = register_metric(
    Metric(
        "nan iterations",
        "bad steps of the interval",
        lambda s: s.nan,
        _format("number of nan iterations: {:3d}"),
    )
)
SPIKES = register_metric(
    Metric(
        "spikes",
        "spikes of the interval, applied or skipped",
        lambda s: s.spikes,
        _if_nonzero("number of spikes: {:3d}"),
    )
)
TOTAL_SKIPPED = register_metric(
    Metric("total skipped iterations", "since the start of the run", lambda s: s.total_skipped)
)
TOTAL_NAN = register_metric(
    Metric("total nan iterations", "since the start of the run", lambda s: s.total_nan)
)
TOTAL_SPIKES = register_metric(
    Metric("total spikes", "since the start of the run", lambda s: s.total_spikes)
)
ROLLBACKS = register_metric(
    Metric(
        "rollbacks",
        "since the start of the run",
        lambda s: s.rollbacks,
        _if_nonzero("number of rollbacks: {:3d}"),
    )
)
SECONDS_REMAINING = register_metric(
    Metric(
        "seconds remaining",
        "estimated time to the end of the run, at the interval's throughput",
        lambda s: s.remaining_samples / s.samples_per_second,
    )
)
FOLD_NUMBER = register_metric(
    Metric("fold number", "current fold, from 1", lambda s: s.fold_number)
)
FOLD_PROGRESS = register_metric(
    Metric("fold progress", "fraction of the current fold, from 0 to 1", lambda s: s.fold_progress)
)


def _memory(name: str, description: str, label: str) -> Metric:
    def value(stats: IntervalStats) -> float | None:
        return stats.memory.get(name)

    return register_metric(
        Metric(name, description, value, panel=MEMORY_PANEL, label=label, scale=1e-9)
    )


MEMORY_PEAK = _memory(
    "memory peak bytes",
    "most memory allocated on the first rank; on a CPU its largest resident set size",
    "peak",
)
MEMORY_ALLOCATED = _memory(
    "memory allocated bytes", "GPU memory in use by tensors of the first rank", "allocated"
)
MEMORY_RESERVED = _memory(
    "memory reserved bytes", "GPU memory reserved by the first rank's allocator", "reserved"
)


def _rank_time(name: str, attribute: str, description: str, label: str = "") -> Metric:
    def value(stats: IntervalStats) -> float | None:
        found: float | None = getattr(stats.rank_times, attribute, None)
        return found

    panel = RANK_TIMES_PANEL if label else None
    return register_metric(Metric(name, description, value, panel=panel, label=label))


COMPUTING_SECONDS = _rank_time(
    "computing seconds",
    "computing",
    "forward and backward passes per iteration, median of all ranks over the last 20 iterations",
    "computing, median rank",
)
LONGEST_COMPUTING_SECONDS = _rank_time(
    "longest computing seconds",
    "longest_computing",
    "the same of the rank that computes longest, which may have the largest pipeline stage",
    "computing, longest",
)
WAITING_SECONDS = _rank_time(
    "waiting seconds",
    "waiting",
    "communication and waits for other ranks per iteration, median of all ranks",
    "waiting, median rank",
)
SLOWEST_RANK = _rank_time(
    "slowest rank",
    "slowest_rank",
    "rank that computes longest compared with ranks of the same work; its host: `slowest host`",
)
STRAGGLER_SHARE = _rank_time(
    "straggler share",
    "straggler_share",
    "share of an iteration that other ranks wait for the slowest rank, from 0 to 1",
)

PREDICTED_SECONDS = register_metric(
    Metric(
        "predicted seconds per iteration",
        "by the estimate of the run (`--estimate`), for the last batch size; on known GPUs only",
        lambda s: None if s.predicted is None else s.predicted.total,
    )
)
PREDICTED_COMPUTING_SECONDS = register_metric(
    Metric(
        "predicted computing seconds",
        "the same of forward and backward passes on the slowest pipeline stage",
        lambda s: None if s.predicted is None else s.predicted.computing,
        panel=RANK_TIMES_PANEL,
        label="computing, predicted",
    )
)

VALIDATION_LOSS = register_metric_group(
    MetricGroup("validation", "loss on a validation set, in nats per token")
)
PERPLEXITY = register_metric_group(MetricGroup("perplexity", "perplexity on a validation set"))
DATASET_LOSS = register_metric_group(
    MetricGroup("dataset loss", "loss on the interval's samples of one dataset")
)
DATASET_TOKENS = register_metric_group(
    MetricGroup("consumed tokens", "tokens of one dataset since the start of the run")
)
LAYER_EXPERT_LOAD = register_metric_group(
    MetricGroup("expert load", "expert load of one layer, from `layer 1`")
)
