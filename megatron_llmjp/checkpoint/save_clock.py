"""Clock of the saves that are due by time, for the rank that decides."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_llmjp.checkpoint.retention import SaveKind, timed_save
from megatron_llmjp.config.schema import CheckpointConfig

STEPS_AHEAD = 3
"""Steps until the next decision takes effect: one to the next decision, and two until all ranks
know it and save."""


class SaveClock:
    """Training time since the last save, and the duration of a step.

    A save is due if the next decision would come too late: saves are never further apart than
    configured, as long as steps take the time that they took before. Time for which a save blocks
    training does not count: slow saves are not more frequent than fast ones.

    Args:
        config: the save policy.
        now: a clock in seconds that is never set.
    """

    def __init__(self, config: CheckpointConfig, now: Callable[[], float] = time.monotonic) -> None:
        self._config, self._now = config, now
        self._saved_at = self._persistent_at = self._stepped_at = now()
        self._step = 0.0

    def restart(self, kind: SaveKind) -> None:
        """Count from now on: training continues after a save, or starts from a checkpoint.

        Args:
            kind: of the save; that of a start is persistent.
        """
        now = self._now()
        # A time limit for persistent saves ignores the others, which may be more frequent.
        if kind is SaveKind.PERSISTENT:
            self._persistent_at = now
        self._saved_at = self._stepped_at = now
        self._step = 0.0

    def step(self) -> None:
        """Measure a step; call it once per iteration.

        A slow step, as one with a validation, counts half as much in each of the following ones.
        """
        last, self._stepped_at = self._stepped_at, self._now()
        self._step = max(self._stepped_at - last, self._step / 2)

    def due(self) -> SaveKind:
        """Return the save that is due now."""
        now = self._now() + STEPS_AHEAD * self._step
        return timed_save(
            self._config, (now - self._saved_at) / 60, (now - self._persistent_at) / 60
        )
