"""The gradient monitor: NaN, Inf and spikes; skipped steps, rollbacks and their reports.

Judges the gradient norm of a step before its update is taken.

The gradient norm is the number that every rank knows in every step without asking the others: a NaN
or Inf in a loss or a gradient, on any rank, is in it, and a batch that would throw the model off
shows in it before it has done harm. An fp16 step that overflows has no gradient norm; it is judged
by the loss scale and by its loss.

Rollbacks after spikes: which batches they skip, how many there were, and what the run lacks.

What a person should know of a step with bad numbers: where it was, and what was in it.
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

HISTORY = 128
"""Norms that a new one is compared with, and steps among which spikes are counted."""

FEWEST = 20
"""Below so many there is nothing to compare with."""


class Verdict(Enum):
    """What is known of a step."""

    GOOD = "good"
    OVERFLOW = "an fp16 overflow"
    """The loss scale was too large and is lowered: part of a healthy fp16 run."""
    BAD = "a NaN or Inf in the gradients"
    SPIKE = "a spike of the gradient norm"


class Judge:
    """Knows the norms of the last good steps, and what to do about a bad one.

    Args:
        faults: the limits.
        history: gradient norms of the steps before.
    """

    def __init__(self, faults: FaultsConfig, history: Iterable[float] = ()) -> None:
        self._faults = faults
        self.history: deque[float] = deque(history, maxlen=HISTORY)
        """Part of a checkpoint, so that a resumed run judges alike."""
        self.verdict = Verdict.GOOD
        """On the last step."""
        self.not_applied = 0
        """Bad steps and skipped spikes since the last update."""
        self._bad = 0
        self._overflows = 0
        self._was_at_floor = False
        self._spikes: deque[bool] = deque(maxlen=HISTORY)

    def state_dict(self) -> dict[str, Any]:
        """Counters for a checkpoint, besides :attr:`history`."""
        return {"overflows": self._overflows, "spikes": [int(spike) for spike in self._spikes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the counters of a checkpoint; an older one has none."""
        self._overflows = int(state.get("overflows", 0))
        self._spikes = deque(map(bool, state.get("spikes", ())), maxlen=HISTORY)

    @property
    def hopeless(self) -> bool:
        """Whether the run must end: too many bad steps in a row, or too many skipped spikes."""
        return self.too_many_bad or self.too_many_spikes

    @property
    def too_many_bad(self) -> bool:
        """Whether ``max_bad_steps`` steps in a row were bad."""
        return self._bad >= self._faults.max_bad_steps

    @property
    def too_many_spikes(self) -> bool:
        """Whether ``max_spikes`` of the last :data:`HISTORY` steps were skipped as spikes."""
        return self._faults.spike_action == "skip" and sum(self._spikes) >= self._faults.max_spikes

    @property
    def may_save(self) -> bool:
        """Whether the run is sound enough to be saved, and older checkpoints to be removed.

        One skipped spike is a batch, two in a row may be the model.
        """
        return self._bad == 0 and self.not_applied < 2

    @property
    def wants_rollback(self) -> bool:
        """Whether the last step asks for going back to the last checkpoint."""
        return self.verdict is Verdict.SPIKE and self._faults.spike_action == "rollback"

    @property
    def usual(self) -> float:
        """The median of the recent gradient norms."""
        return statistics.median(self.history) if self.history else math.nan

    def begin_step(self) -> None:
        """Forget the last verdict: an fp16 step that overflows ends without one."""
        self.verdict = Verdict.GOOD

    def may_take(self, grad_norm: float) -> bool:
        """Judge one step by its gradient norm, and say whether its update may be taken."""
        self.verdict = self._verdict(grad_norm)
        self._overflows, self._was_at_floor = 0, False
        if self.verdict is Verdict.BAD:
            self._count_bad()
            return False
        is_spike = self.verdict is Verdict.SPIKE
        self._spikes.append(is_spike)
        if is_spike and self._faults.spike_action != "warn":
            self.not_applied += 1
            return False
        self._bad = self.not_applied = 0
        self.history.append(grad_norm)
        return True

    def overflowed(self, optimizer: OptimizerConfig, scale: float, loss_is_finite: bool) -> None:
        """Judge an fp16 step whose scaled gradients held a NaN or Inf; it was not taken.

        It is bad when a lower loss scale cannot help: the loss itself is NaN or Inf, the scale is
        constant or was at its floor before, or ``max_overflow_steps`` steps in a row overflowed.

        Args:
            optimizer: with the limits of the loss scale.
            scale: the loss scale after the step.
            loss_is_finite: on all ranks.
        """
        self._overflows += 1
        is_constant = optimizer.loss_scale is not None
        at_floor = scale <= optimizer.min_loss_scale * (1 + 1e-6)
        cannot_help = is_constant or (at_floor and self._was_at_floor) or not loss_is_finite
        self._was_at_floor = at_floor
        if cannot_help or self._overflows > self._faults.max_overflow_steps:
            self.verdict = Verdict.BAD
            self._count_bad()
        else:
            self.verdict = Verdict.OVERFLOW

    def _count_bad(self) -> None:
        self._bad += 1
        self.not_applied += 1

    def _verdict(self, grad_norm: float) -> Verdict:
        if not math.isfinite(grad_norm):
            return Verdict.BAD
        watching = self._faults.spike_action != "off" and len(self.history) >= FEWEST
        if watching and grad_norm > self._faults.spike_threshold * self.usual:
            return Verdict.SPIKE
        return Verdict.GOOD


WINDOW = 1000
"""Iterations in which ``max_rollbacks`` are allowed."""

_WORD = "positions"


@dataclass(frozen=True)
class Rollback:
    """A request to go back to the last checkpoint and to skip the batches that led to a spike."""

    iteration: int
    positions: tuple[int, int]
    """Of the schedule, half open."""

    @property
    def words(self) -> str:
        """How a checkpoint names the skipped positions (``RunHistory.skipped_iterations``)."""
        return f"{_WORD} {self.positions[0]}-{self.positions[1]}"


def count(run: Run) -> int:
    """Rollbacks of the run so far."""
    return len(_ranges(run))


def count_recent(run: Run, sizes: BatchSizeSchedule, iteration: int) -> int:
    """Rollbacks that skipped batches of the :data:`WINDOW` iterations before this one."""
    first = sizes.consumed_after(max(0, iteration - WINDOW))
    return sum(run.schedule.skips.kept_before(end) >= first for _, end in _ranges(run).values())


def planned_iterations(run: Run) -> int:
    """Iterations that the run would have without its rollbacks."""
    other = [r for words, r in run.history.skipped_iterations.items() if not _is_rollback(words)]
    by_user = SkippedSamples.of([*other, *(skip.samples for skip in run.folds.skip)])
    return train_iterations(run.config, run.schedule.with_skips(by_user))[0]


def _ranges(run: Run) -> dict[str, tuple[int, int]]:
    """Positions that rollbacks skipped, by their words."""
    skipped = run.history.skipped_iterations
    return {words: positions for words, positions in skipped.items() if _is_rollback(words)}


def _is_rollback(words: str) -> bool:
    return words.startswith(f"{_WORD} ")


SHOWN = 10
"""Documents that are named; ``inspect_dataset --run`` shows all."""


def describe_step(
    run: Run, judge: Judge, iteration: int, batch: range, grad_norm: float, gives_up: bool
) -> str:
    """One line on a step: what was wrong, what was done, and the documents of its batch.

    Args:
        run: the run.
        judge: with its verdict.
        iteration: the step's.
        batch: numbers of the trained samples.
        grad_norm: before clipping.
        gives_up: whether a limit is reached, which ends the run.
    """
    fold = run.schedule.fold_of_sample(batch[-1]).name
    norm = f"gradient norm {grad_norm:.3g}, usually {judge.usual:.3g}"
    return (
        f"iteration {iteration}, fold '{fold}': {judge.verdict.value} ({norm}); "
        f"{_consequence(run, judge, gives_up)}. Documents: {_documents(run, batch)}"
    )


def describe_end(run: Run, judge: Judge, iteration: int, grad_norm: float, rollbacks: int) -> str:
    """Which limit ended a run, and what to change.

    Args:
        run: the run.
        judge: with its verdict.
        iteration: the last step's.
        grad_norm: the last step's, before clipping.
        rollbacks: how many count against the limit.
    """
    faults = run.config.faults
    if judge.too_many_bad:
        return (
            f"iteration {iteration} was the last of too many bad steps in a row "
            f"(--max-bad-steps {faults.max_bad_steps}). A model that holds NaN or Inf does not "
            "recover; if a restart comes to the same steps, leave their batches out with "
            "--skip-iterations"
        )
    norm = f"the gradient norm is {grad_norm:.3g} where {judge.usual:.3g} was usual"
    if judge.too_many_spikes:
        return (
            f"iteration {iteration} was one of too many skipped spikes (--max-spikes "
            f"{faults.max_spikes} among {HISTORY} steps): {norm}. If this is its new level, as "
            "after a change of the data, restart with --spike-action warn or a higher "
            f"--spike-threshold than {faults.spike_threshold:g}"
        )
    return (
        f"iteration {iteration} is a spike after {rollbacks} rollbacks (--max-rollbacks "
        f"{faults.max_rollbacks} within {WINDOW:,} iterations): {norm}. Restart from an earlier "
        "checkpoint (--load SAVE/iter_...), with a lower learning rate, or, if this is the norm's "
        f"new level, with a higher --spike-threshold than {faults.spike_threshold:g}"
    )


def _consequence(run: Run, judge: Judge, gives_up: bool) -> str:
    if gives_up:
        return "the step is not taken, and the run ends"
    if judge.wants_rollback:
        return "going back to the last checkpoint, leaving out the batches that led here"
    if judge.verdict is Verdict.SPIKE and run.config.faults.spike_action == "warn":
        return "the step is taken (--spike-action skip or rollback would not)"
    return "the step is not taken"


def _documents(run: Run, batch: range) -> str:
    lineage = Lineage(run.schedule, EpochDatasets(run.config.data, run.tokenizer, run.cache))
    found: dict[tuple[str, int], None] = {}
    for number in batch:
        for dataset, document, _, _ in lineage.documents_of(number):
            found[dataset, document] = None
        if len(found) > SHOWN:
            break
    named = [f"{dataset} {document}" for dataset, document in list(found)[:SHOWN]]
    more = "" if len(found) <= SHOWN else f", ... (of {len(batch)} samples)"
    return ", ".join(named) + more
