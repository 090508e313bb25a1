"""Cost of failures: the save interval that loses least, and the duration of a run with failures.

Failures occur at a constant rate while a job runs, and each ends the job. The job waits in the
queue, starts, and continues from its last complete checkpoint. In the formulas, all in seconds:

- M: mean time between failures of the job;
- C: time for which a save blocks training; W >= C: time until the checkpoint is complete, of which
  an asynchronous save spends W - C in the background;
- R: time from the start of a job to its first step; Q: time in the queue before it;
- t: training time between two saves.

The k-th checkpoint of a job is complete when it has run for R + t + W + (k - 1)(t + C). A job runs
longer than x with probability exp(-x / M), so that it adds

    N = exp(-(R + t + W) / M) / (1 - exp(-(t + C) / M))

checkpoints on average, and a run takes (M + Q) / (N t) times its training time. With W = C and
Q = 0 this is Daly's cost function. Only (exp(t / M) - exp(-C / M)) / t depends on t: the best
interval of an asynchronous save is Daly's too, with the C that it has.

- J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of
  the ACM 17(9), 1974: t = sqrt(2 C M).
- J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
  Future Generation Computer Systems 22(3), 2006: :func:`best_interval`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PUBLISHED_FAILURES = 419
PUBLISHED_GPU_HOURS = 54 * 24 * 16_384
PUBLISHED_SOURCE = "Llama 3: 419 in 54 days on 16,384 H100"
"""Unexpected interruptions of the training of Llama 3 405B: "The Llama 3 Herd of Models" (2024),
arXiv:2407.21783, on reliability."""


@dataclass(frozen=True)
class FailureModel:
    """Failures, saves and restarts of a job; all times in seconds."""

    between_failures: float
    """Mean time between failures while the job runs (M)."""
    save_stall: float
    """Time for which a save blocks training (C)."""
    save_time: float
    """Time until a save is complete (W)."""
    restart: float
    """From the start of the job to its first step (R)."""
    queue: float
    """From a failure to the start of the job (Q)."""


@dataclass(frozen=True)
class ExpectedTime:
    """Expected wall-clock time of a run, in seconds, and what it is spent on."""

    training: float
    """Without failures and saves."""
    saves: float
    restarts: float
    queue: float
    lost: float
    """Steps and saves that are repeated after failures."""
    failures: float
    """Number of failures."""

    @property
    def total(self) -> float:
        """Expected time of the whole run."""
        return self.training + self.saves + self.restarts + self.queue + self.lost


def published_time_between_failures(gpus: int) -> float:
    """Return the mean time between failures in seconds that was published, for this many GPUs."""
    return PUBLISHED_GPU_HOURS * 3600 / PUBLISHED_FAILURES / gpus


def best_interval(model: FailureModel) -> float:
    """Return the training time between saves that loses least, in seconds.

    Daly's higher-order estimate. A save cannot begin before the previous one is complete.
    """
    stall, mtbf = model.save_stall, model.between_failures
    ratio = stall / (2 * mtbf)
    if ratio < 1:
        best = math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall
    else:
        best = mtbf
    return max(best, model.save_time - stall)


def expected_time(model: FailureModel, training: float, interval: float) -> ExpectedTime:
    """Return the expected time of a run.

    Args:
        model: failures, saves and restarts.
        training: duration of the run without failures and saves, in seconds.
        interval: training time between two saves, in seconds; at most ``training``.
    """
    mtbf = model.between_failures
    period, first = interval + model.save_stall, model.restart + interval + model.save_time
    # The logarithm of 1 / N: N itself underflows if a job hardly ever reaches its first save.
    per_save = min(first / mtbf + math.log(-math.expm1(-period / mtbf)), 700.0)
    failures = training / interval * math.exp(per_save)
    restarts = failures * mtbf * -math.expm1(-model.restart / mtbf)
    saves = training / interval * model.save_stall
    return ExpectedTime(
        training=training,
        saves=saves,
        restarts=restarts,
        queue=failures * model.queue,
        lost=max(0.0, failures * mtbf - training - saves - restarts),
        failures=failures,
    )


@dataclass(frozen=True)
class ObservedJobs:
    """Jobs of a run so far."""

    failures: int
    """Jobs that ended with an error or were lost; without those that were asked to stop."""
    seconds: float
    """Time that jobs ran."""
    queue: float | None = None
    """Mean time between the end of a job and the start of the next one, in seconds."""
    save_time: float | None = None
    """Median time until a save was complete, in seconds."""
    save_stall: float | None = None
    """Median time for which a save blocked training, in seconds."""


def time_between_failures(published: float, observed: ObservedJobs | None) -> float:
    """Return the mean time between failures of a run, in seconds.

    The published time counts as one failure in that time (the mean of a Gamma posterior), so that
    it decides for a new run, and the run's own history for an old one.
    """
    if observed is None:
        return published
    return (published + observed.seconds) / (1 + observed.failures)
