"""Whether any rank of a run makes progress: one counter that all ranks add to.

A rank that waits for another one in a collective makes no progress by itself, and is healthy as
long as the other one does. So progress is counted for the whole run, in the rendezvous store.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from megatron_llmjp.training.hang_report import files_of, waits_for_others

COUNTER = "progress"

LEAST_SHARE = 0.02
"""Of a processor that work takes; a thread that waits and looks now and then takes less."""


class Progress:
    """Heartbeats of this rank, and news of those of the others."""

    def __init__(self, store: Any, period: float) -> None:
        """Exchange news every ``period`` seconds through ``store``, from a thread."""
        self.counts_work = False
        """Whether work of the main thread counts, although it gives no heartbeat: its processor
        time, and that of processes it started. For phases with long calls into libraries."""
        self._store, self._period = store, period
        self._own = self._news = False
        self._seen = -1
        self._main = threading.get_ident()
        self._activity = _Activity(period)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="progress", daemon=True)

    def start(self) -> None:
        """Begin to exchange news."""
        self._thread.start()

    def beat(self) -> None:
        """This rank makes progress. Called from any thread; costs nothing."""
        self._own = self._news = True

    def take_news(self) -> bool:
        """Whether any rank made progress since this was asked last."""
        news, self._news = self._news, False
        return news

    def close(self) -> None:
        """End the thread, unless it waits for a store that does not answer."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._period)

    def _exchange(self) -> None:
        # A store whose process is stopped never answers: nothing but this thread waits for it.
        while not self._stopped.wait(self._period):
            if self._activity.advanced(self.counts_work and not self._waits()):
                self.beat()
            own, self._own = self._own, False
            try:
                count = self._store.add(COUNTER, int(own))
            except Exception:  # the first rank is gone, which is reported elsewhere
                return
            if count != self._seen:
                self._seen, self._news = count, True

    def _waits(self) -> bool:
        """Whether the main thread waits for other ranks, which takes processor time, too."""
        return waits_for_others(files_of(sys._current_frames().get(self._main)))


class _Activity:
    """What the kernel counted for the main thread: bytes read and written, processor time."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._task = Path(f"/proc/self/task/{threading.get_native_id()}")
        self._process = psutil.Process()
        self._bytes, self._seconds = self._transferred(), 0.0

    def advanced(self, counts_work: bool) -> bool:
        """Whether there is more than when this was asked last."""
        transferred, before = self._transferred(), self._bytes
        self._bytes = transferred
        if not counts_work:
            return transferred != before
        seconds, worked = self._worked(), self._seconds
        self._seconds = seconds
        return transferred != before or seconds - worked > LEAST_SHARE * self._period

    def _transferred(self) -> int:
        """Bytes that the thread read and wrote so far; 0 where the kernel does not report them."""
        try:
            lines = (self._task / "io").read_text().splitlines()
        except OSError:
            return 0
        counts = dict(line.split(": ") for line in lines)
        return int(counts["rchar"]) + int(counts["wchar"])

    def _worked(self) -> float:
        """Processor seconds of the thread and of the processes that this one started."""
        seconds = 0.0
        with contextlib.suppress(OSError, psutil.Error):
            fields = (self._task / "stat").read_text().rpartition(")")[2].split()
            seconds += float(fields[11]) + float(fields[12])
            for child in self._process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    times = child.cpu_times()
                    seconds += times.user + times.system
        return seconds
