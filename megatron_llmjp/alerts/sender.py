"""Alerts of a process that must not wait for them: a queue and a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from megatron_llmjp.alerts.delivery import Alert, deliver
from megatron_llmjp.alerts.destinations import Destinations
from megatron_llmjp.filesystem import warn

MAX_PENDING = 8
"""Alerts that wait for a server that does not respond; further ones are dropped."""
CLOSE_SECONDS = 10.0
"""Time after :meth:`AlertSender.close` in which pending alerts are still sent."""


class AlertSender:
    """Send alerts in a thread, in order; its methods never wait."""

    def __init__(
        self,
        destinations: Destinations,
        deliver: Callable[[Alert, Destinations], object] = deliver,
    ) -> None:
        """Create a sender; the thread starts with the first alert."""
        self._destinations, self._deliver = destinations, deliver
        self._pending: queue.Queue[Alert | None] = queue.Queue(MAX_PENDING)
        self._closed_at: float | None = None
        self._dropped = 0
        # Not a daemon: a process that ends its training waits for its last alerts, for a time.
        self._thread = threading.Thread(target=self._run, name="alerts")

    def send(self, alert: Alert) -> None:
        """Send an alert soon, or drop it if too many are pending."""
        try:
            self._pending.put_nowait(alert)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                warn(f"alert '{alert.event}' was dropped: earlier ones are not delivered yet")
            return
        self._dropped = 0
        if self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """Let the thread end; it still sends pending alerts for :data:`CLOSE_SECONDS`."""
        self._closed_at = time.monotonic()
        if not self._pending.full():
            self._pending.put_nowait(None)

    def _run(self) -> None:
        while True:
            alert = self._pending.get()
            if alert is None or self._is_late():
                return
            self._deliver(alert, self._destinations)
            if self._closed_at is not None and self._pending.empty():
                return

    def _is_late(self) -> bool:
        return self._closed_at is not None and time.monotonic() - self._closed_at > CLOSE_SECONDS
