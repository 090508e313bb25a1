"""Measurements of one log interval, which the metrics of a run are computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SLOW_SHARE = 0.1
"""Share of an iteration that others wait for a slow rank, by default."""


@dataclass(frozen=True)
class RankTimes:
    """Times of the ranks per iteration, medians over the latest steps (training/stragglers.py)."""

    computing: float
    """Median of all ranks, in seconds."""
    longest_computing: float
    waiting: float
    """Median of all ranks, in seconds."""
    slowest_rank: int | None = None
    """First of the slowest ranks; None if no two ranks have the same work."""
    straggler_share: float | None = None
    """Share of an iteration that others wait for the slowest rank."""


@dataclass(frozen=True)
class PredictedStep:
    """Predicted times of a step, in seconds (estimate/speed/step_time.py)."""

    total: float
    computing: float
    """Forward and backward passes on the slowest pipeline stage."""


@dataclass(frozen=True)
class ExpertStats:
    """Routing of tokens to experts (training/expert_monitor.py)."""

    load_balancing_loss: float | None
    """Mean over layers and micro-batches, without its coefficient; None if it is disabled."""
    router_z_loss: float | None
    """The same of the routers' z-loss."""
    load: Mapping[int, float]
    """Tokens of the busiest expert by the mean, by layer, from 1."""
    tokens: Mapping[int, Sequence[int]]
    """Tokens of each expert, by layer, from 1."""
    dropped: float | None
    """Fraction of the choices of experts that exceeded a capacity; None without one."""


@dataclass(frozen=True)
class IntervalStats:
    """Measurements of one log interval; values of a step are those of the last one."""

    steps: int
    samples: int
    seconds: float
    """Time spent in steps; validations and saves are excluded."""
    consumed_samples: int
    """Since the start of the run."""
    remaining_samples: int
    sequence_length: int
    lm_loss: float
    """Mean cross entropy in nats per token; NaN if no step had a loss."""
    z_loss: float | None
    """Mean z-loss per token; None if it is disabled."""
    grad_norm: float
    params_norm: float | None
    """None if it is not logged."""
    learning_rate: float
    global_batch_size: int
    loss_scale: float
    skipped: int
    nan: int
    spikes: int
    total_skipped: int
    total_nan: int
    total_spikes: int
    rollbacks: int
    tflops_per_gpu: float
    peak_tflops: float | None
    """Peak TFLOP/s of one device; None if unknown."""
    fold_number: int
    fold_progress: float
    memory: Mapping[str, float] = field(default_factory=dict)
    """Bytes, by the name of the metric (``Device.memory``)."""
    rank_times: RankTimes | None = None
    """None before the first steps are measured, or if it is disabled."""
    experts: ExpertStats | None = None
    """None without experts."""
    predicted: PredictedStep | None = None
    """For a step of the last batch size; None on a CPU or an unknown GPU."""

    @property
    def samples_per_second(self) -> float:
        """Throughput of all ranks."""
        return self.samples / self.seconds
