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
    BAD = "NaN or Inf"
    SPIKE = "spike"


class Numbers:
    """The norms of the last good steps. Part of a checkpoint, so that a resume judges alike."""

    def __init__(self, faults: FaultsConfig, history: Iterable[float] = ()) -> None:
        self._threshold = faults.spike_threshold
        self._watching = faults.spike_action != "off"
        self._limit = faults.max_bad_steps
        self.history: deque[float] = deque(history, maxlen=HISTORY)
        self.bad_in_a_row = 0

    @property
    def hopeless(self) -> bool:
        """Whether too many steps in a row were bad."""
        return self.bad_in_a_row >= self._limit

    @property
    def median(self) -> float:
        """The usual gradient norm of late."""
        return statistics.median(self.history) if self.history else math.nan

    def judge(self, grad_norm: float) -> Verdict:
        """Judge one step; a good one becomes part of the history."""
        if not math.isfinite(grad_norm):
            self.bad_in_a_row += 1
            return Verdict.BAD
        self.bad_in_a_row = 0
        if self._is_spike(grad_norm):
            return Verdict.SPIKE
        self.history.append(grad_norm)
        return Verdict.GOOD

    def _is_spike(self, grad_norm: float) -> bool:
        enough = self._watching and len(self.history) >= FEWEST
        return enough and grad_norm > self._threshold * self.median
