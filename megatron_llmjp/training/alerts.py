"""Alerts on spikes and bad steps, from the events that are written with the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from megatron_llmjp.alerts.delivery import Alert
from megatron_llmjp.alerts.sender import AlertSender
from megatron_llmjp.metric_registry import EVENT

BAD_STEP_EVENT = "bad step"
"""Event of a spike, NaN or Inf (``training/trainer.py``)."""
PAUSE_SECONDS = 600.0
"""Shortest time between two alerts: with ``spike_action warn`` each step may be a spike."""


class EventRecord(Protocol):
    """A record of metrics or of an event (``MetricsRecord``)."""

    @property
    def strings(self) -> Mapping[str, str]:
        """Fields that are not numbers."""


class AlertWriter:
    """A destination of metrics that sends alerts; it never waits."""

    def __init__(
        self,
        sender: AlertSender,
        save: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sender, self._save, self._clock = sender, save, clock
        self._last: float | None = None
        self._omitted = 0

    def write(self, record: EventRecord) -> None:
        """Send an alert if the record is a bad step, unless one was sent recently."""
        if record.strings.get(EVENT) != BAD_STEP_EVENT:
            return
        now = self._clock()
        if self._last is not None and now - self._last < PAUSE_SECONDS:
            self._omitted += 1
            return
        message = record.strings.get("why", "")
        if self._omitted:
            message += f" ({self._omitted} more since the last alert)"
        self._last, self._omitted = now, 0
        self._sender.send(Alert("spike", message, self._save))

    def close(self) -> None:
        """Let the sender end after its pending alerts."""
        self._sender.close()
