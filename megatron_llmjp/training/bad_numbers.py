"""Judges the gradient norm of a step before its update is taken.

The gradient norm is the number that every rank knows in every step without asking the others: a NaN
or Inf in a loss or a gradient, on any rank, is in it, and a batch that would throw the model off
shows in it before it has done harm.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from enum import Enum

from megatron_llmjp.config.schema import FaultsConfig

HISTORY = 128
"""Norms that a new one is compared with."""

FEWEST = 20
"""Below so many there is nothing to compare with."""


class Verdict(Enum):
    """What a gradient norm tells of a step."""

    GOOD = "good"
    BAD = "a NaN or Inf in the gradients"
    SPIKE = "a spike of the gradient norm"


class Judge:
    """Knows the norms of the last good steps, and what to do about a bad one."""

    def __init__(self, faults: FaultsConfig, history: Iterable[float] = ()) -> None:
        self._faults = faults
        self.history: deque[float] = deque(history, maxlen=HISTORY)
        """Part of a checkpoint, so that a run that goes on judges alike."""
        self.verdict = Verdict.GOOD
        """On the last step."""
        self._bad_in_a_row = 0

    @property
    def hopeless(self) -> bool:
        """Whether too many steps in a row were bad."""
        return self._bad_in_a_row >= self._faults.max_bad_steps

    @property
    def wants_rollback(self) -> bool:
        """Whether the last step asks for going back to the last checkpoint."""
        return self.verdict is Verdict.SPIKE and self._faults.spike_action == "rollback"

    @property
    def usual(self) -> float:
        """The median of the gradient norm of late."""
        return statistics.median(self.history) if self.history else math.nan

    def begin_step(self) -> None:
        """Forget the last verdict: an fp16 step that overflows ends without one."""
        self.verdict = Verdict.GOOD

    def may_take(self, grad_norm: float) -> bool:
        """Judge one step, and say whether its update may be taken."""
        self.verdict = self._verdict(grad_norm)
        self._bad_in_a_row = self._bad_in_a_row + 1 if self.verdict is Verdict.BAD else 0
        taken = self.verdict is Verdict.GOOD or (
            self.verdict is Verdict.SPIKE and self._faults.spike_action == "warn"
        )
        if taken:
            self.history.append(grad_norm)
        return taken

    def _verdict(self, grad_norm: float) -> Verdict:
        if not math.isfinite(grad_norm):
            return Verdict.BAD
        watching = self._faults.spike_action != "off" and len(self.history) >= FEWEST
        if watching and grad_norm > self._faults.spike_threshold * self.usual:
            return Verdict.SPIKE
        return Verdict.GOOD
