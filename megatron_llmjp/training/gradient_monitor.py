"""The gradient monitor: NaN, Inf and spikes; skipped steps, rollbacks and their reports.

The gradient norm of a step is checked before its update is applied. Every rank knows the norm of
every step without further communication, and a NaN or Inf in any loss or gradient on any rank makes
it NaN or Inf. An fp16 step that overflows has no gradient norm; it is classified by the loss scale
and by its loss.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_llmjp.config.schema import FaultsConfig, OptimizerConfig
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schedule import SkippedSamples
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.lineage import Lineage
from megatron_llmjp.run import Run
from megatron_llmjp.run_data import train_iterations

HISTORY_LENGTH = 128
"""Number of recent norms that the median is taken of, and of steps in which spikes are counted."""

MIN_HISTORY = 20
"""With fewer recorded norms no step is classified as a spike."""

ROLLBACK_WINDOW = 1000
"""Number of iterations in which ``max_rollbacks`` rollbacks are allowed."""
_KEY_PREFIX = "positions"
"""First word of a rollback's key in ``skipped_iterations``; keys of the user are iterations."""
MAX_DOCUMENTS_SHOWN = 10
"""Number of documents listed in a warning; ``inspect_dataset --run`` lists all."""


class StepStatus(Enum):
    """Classification of an optimizer step."""

    GOOD = "good"
    OVERFLOW = "an fp16 overflow"
    """The loss scale was too large and has been lowered; expected in fp16 training."""
    BAD = "a NaN or Inf in the gradients"
    SPIKE = "a spike of the gradient norm"


class GradientMonitor:
    """Classify steps by their gradient norms, and decide whether to apply, skip or roll back.

    Args:
        faults: the limits.
        history: gradient norms of the most recent applied steps.
    """

    def __init__(self, faults: FaultsConfig, history: Iterable[float] = ()) -> None:
        self._faults = faults
        self.history: deque[float] = deque(history, maxlen=HISTORY_LENGTH)
        """Gradient norms of the most recent applied steps; stored in checkpoints."""
        self.status = StepStatus.GOOD
        """Classification of the last step."""
        self.not_applied = 0
        """Bad steps and skipped spikes since the last applied update."""
        self._bad_steps = 0
        self._overflows = 0
        self._was_at_minimum = False
        self._spikes: deque[bool] = deque(maxlen=HISTORY_LENGTH)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters for a checkpoint; :attr:`history` is stored separately."""
        return {"overflows": self._overflows, "spikes": [int(spike) for spike in self._spikes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the counters of a checkpoint; older checkpoints have none."""
        self._overflows = int(state.get("overflows", 0))
        self._spikes = deque(map(bool, state.get("spikes", ())), maxlen=HISTORY_LENGTH)

    @property
    def limit_reached(self) -> bool:
        """Whether the run must end: too many consecutive bad steps, or too many skipped spikes."""
        return self.too_many_bad_steps or self.too_many_spikes

    @property
    def too_many_bad_steps(self) -> bool:
        """Whether the last ``max_bad_steps`` steps were all bad."""
        return self._bad_steps >= self._faults.max_bad_steps

    @property
    def too_many_spikes(self) -> bool:
        """Whether ``max_spikes`` of the last :data:`HISTORY_LENGTH` steps were skipped."""
        return self._faults.spike_action == "skip" and sum(self._spikes) >= self._faults.max_spikes

    @property
    def may_save(self) -> bool:
        """Whether the model may be saved, and older checkpoints removed.

        A single skipped spike may be caused by its batch, two in a row by the model.
        """
        return self._bad_steps == 0 and self.not_applied < 2

    @property
    def needs_rollback(self) -> bool:
        """Whether the last step requires a rollback to the last checkpoint."""
        return self.status is StepStatus.SPIKE and self._faults.spike_action == "rollback"

    @property
    def median_norm(self) -> float:
        """Median of the recent gradient norms; NaN without any."""
        return statistics.median(self.history) if self.history else math.nan

    def begin_step(self) -> None:
        """Reset :attr:`status`: an fp16 step that overflows never reaches :meth:`should_apply`."""
        self.status = StepStatus.GOOD

    def should_apply(self, grad_norm: float) -> bool:
        """Classify a step by its gradient norm and return whether to apply its update."""
        self.status = self._classify(grad_norm)
        self._overflows, self._was_at_minimum = 0, False
        if self.status is StepStatus.BAD:
            self._count_bad()
            return False
        is_spike = self.status is StepStatus.SPIKE
        self._spikes.append(is_spike)
        if is_spike and self._faults.spike_action != "warn":
            self.not_applied += 1
            return False
        self._bad_steps = self.not_applied = 0
        self.history.append(grad_norm)
        return True

    def record_overflow(
        self, optimizer: OptimizerConfig, scale: float, loss_is_finite: bool
    ) -> None:
        """Classify an fp16 step that was not applied because its scaled gradients overflowed.

        It is a bad step if a lower loss scale cannot help: the loss itself is NaN or Inf, the scale
        is constant or was already at its minimum, or more than ``max_overflow_steps`` consecutive
        steps overflowed.

        Args:
            optimizer: the limits of the loss scale.
            scale: the loss scale after the step.
            loss_is_finite: whether the loss is finite on all ranks.
        """
        self._overflows += 1
        is_constant = optimizer.loss_scale is not None
        at_minimum = scale <= optimizer.min_loss_scale * (1 + 1e-6)
        cannot_help = is_constant or (at_minimum and self._was_at_minimum) or not loss_is_finite
        self._was_at_minimum = at_minimum
        if cannot_help or self._overflows > self._faults.max_overflow_steps:
            self.status = StepStatus.BAD
            self._count_bad()
        else:
            self.status = StepStatus.OVERFLOW

    def _count_bad(self) -> None:
        self._bad_steps += 1
        self.not_applied += 1

    def _classify(self, grad_norm: float) -> StepStatus:
        if not math.isfinite(grad_norm):
            return StepStatus.BAD
        is_enabled = self._faults.spike_action != "off" and len(self.history) >= MIN_HISTORY
        if is_enabled and grad_norm > self._faults.spike_threshold * self.median_norm:
            return StepStatus.SPIKE
        return StepStatus.GOOD


@dataclass(frozen=True)
class Rollback:
    """A rollback to the last checkpoint that skips the batches leading to a spike."""

    iteration: int
    positions: tuple[int, int]
    """Half-open range of positions in the schedule to skip."""

    @property
    def key(self) -> str:
        """Key of the skipped positions in a checkpoint's ``skipped_iterations``."""
        return f"{_KEY_PREFIX} {self.positions[0]}-{self.positions[1]}"


def count_rollbacks(run: Run) -> int:
    """Return the number of rollbacks of the run so far."""
    return len(_rollback_positions(run))


def count_recent_rollbacks(run: Run, sizes: BatchSizeSchedule, iteration: int) -> int:
    """Count rollbacks that skipped batches of the last :data:`ROLLBACK_WINDOW` iterations."""
    first = sizes.consumed_after(max(0, iteration - ROLLBACK_WINDOW))
    return sum(
        run.schedule.skips.kept_before(end) >= first for _, end in _rollback_positions(run).values()
    )


def planned_iterations(run: Run) -> int:
    """Return the number of iterations that the run would have without its rollbacks."""
    other = [r for key, r in run.history.skipped_iterations.items() if not _is_rollback_key(key)]
    by_user = SkippedSamples.of([*other, *(skip.samples for skip in run.folds.skip)])
    return train_iterations(run.config, run.schedule.with_skips(by_user))[0]


def _rollback_positions(run: Run) -> dict[str, tuple[int, int]]:
    """Return the ranges of positions that rollbacks skipped, by key."""
    skipped = run.history.skipped_iterations
    return {key: positions for key, positions in skipped.items() if _is_rollback_key(key)}


def _is_rollback_key(key: str) -> bool:
    return key.startswith(f"{_KEY_PREFIX} ")


def describe_bad_step(
    run: Run,
    monitor: GradientMonitor,
    iteration: int,
    batch: range,
    grad_norm: float,
    limit_reached: bool,
) -> str:
    """Return one line on a bad step: its cause, the action taken, the documents of its batch.

    Args:
        run: the run.
        monitor: the gradient monitor after the step.
        iteration: number of the step.
        batch: sample numbers of the batch.
        grad_norm: gradient norm before clipping.
        limit_reached: whether the step ends the run.
    """
    fold = run.schedule.fold_of_sample(batch[-1]).name
    norm = f"gradient norm {grad_norm:.3g}, recent median {monitor.median_norm:.3g}"
    return (
        f"iteration {iteration}, fold '{fold}': {monitor.status.value} ({norm}); "
        f"{_action(run, monitor, limit_reached)}. Documents: {_documents(run, batch)}"
    )


def describe_failure(
    run: Run, monitor: GradientMonitor, iteration: int, grad_norm: float, rollbacks: int
) -> str:
    """Return the error of a run that reached a limit: which limit, and how to continue.

    Args:
        run: the run.
        monitor: the gradient monitor after the last step.
        iteration: number of the last step.
        grad_norm: gradient norm of the last step before clipping.
        rollbacks: number of rollbacks that count towards ``max_rollbacks``.
    """
    faults = run.config.faults
    if monitor.too_many_bad_steps:
        return (
            f"iteration {iteration} was the last of too many consecutive bad steps "
            f"(--max-bad-steps {faults.max_bad_steps}). A model that contains NaN or Inf does not "
            "recover; if a restart fails at the same steps, skip their batches with "
            "--skip-iterations"
        )
    norm = f"the gradient norm is {grad_norm:.3g}, the recent median {monitor.median_norm:.3g}"
    if monitor.too_many_spikes:
        return (
            f"iteration {iteration} was one of too many skipped spikes (--max-spikes "
            f"{faults.max_spikes} in {HISTORY_LENGTH} steps): {norm}. If this is the new level of "
            "the norm, for example after a change of the data, restart with --spike-action warn "
            f"or with --spike-threshold above {faults.spike_threshold:g}"
        )
    return (
        f"iteration {iteration} is a spike after {rollbacks} rollbacks (--max-rollbacks "
        f"{faults.max_rollbacks} within {ROLLBACK_WINDOW:,} iterations): {norm}. Restart from an "
        "earlier checkpoint (--load SAVE/iter_...) with a lower learning rate or, if this is the "
        f"new level of the norm, with --spike-threshold above {faults.spike_threshold:g}"
    )


def _action(run: Run, monitor: GradientMonitor, limit_reached: bool) -> str:
    if limit_reached:
        return "the step is not applied, and the run ends"
    if monitor.needs_rollback:
        return "rolling back to the last checkpoint, skipping the batches that led to the spike"
    if monitor.status is StepStatus.SPIKE and run.config.faults.spike_action == "warn":
        return "the step is applied (skipped with --spike-action skip or rollback)"
    return "the step is not applied"


def _documents(run: Run, batch: range) -> str:
    epochs = EpochDatasets(run.config.data, run.tokenizer, run.cache, datasets=run.datasets)
    lineage = Lineage(run.schedule, epochs)
    found: dict[tuple[str, int], None] = {}
    for number in batch:
        for dataset, document, _, _ in lineage.documents_of(number):
            found[dataset, document] = None
        if len(found) > MAX_DOCUMENTS_SHOWN:
            break
    named = [f"{dataset} {document}" for dataset, document in list(found)[:MAX_DOCUMENTS_SHOWN]]
    more = "" if len(found) <= MAX_DOCUMENTS_SHOWN else f", ... (of {len(batch)} samples)"
    return ", ".join(named) + more
