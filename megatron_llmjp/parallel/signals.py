"""Requests to end this process: signals, and the end of the time that it has.

A thread takes them. Python runs the handlers of signals on the main thread only, and only when that
is back in Python; a rank may wait in a collective or at a store for hours.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time

from megatron_llmjp.errors import EXIT_INTERRUPTED, EXIT_REQUEUE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
"""Slurm's before it takes a node away, what ``sbatch --signal`` sends as a rule, a closed terminal,
and Ctrl-C. They all mean: save and stop."""

SECOND_INTERRUPT_SECONDS = 1.0
"""A launcher may hand on a Ctrl-C that the terminal has sent as well: only later is it another."""

FIRST_RANK_LEAD_SECONDS = 10.0
"""Of ranks whose time is over before training, the first one ends first, and reports it."""


def handled_signals() -> tuple[signal.Signals, ...]:
    """The signals that mean to stop: all but SIGHUP where ``nohup`` has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (ignored and number is signal.SIGHUP))


class StopRequests:
    """Ends the process at a request, or, while it trains, remembers the request."""

    def __init__(self, is_first: bool = True, end: float | None = None) -> None:
        """Take nothing yet.

        Args:
            is_first: whether this rank speaks for all.
            end: ``time.monotonic()`` at which the time is over.
        """
        self.signal: signal.Signals | None = None
        """The last one, while requests are remembered."""
        self._is_first, self._end = is_first, end
        self._remembers = False
        self._interrupted = -float("inf")
        self._lock = threading.Lock()
        self._reader = self._writer = -1

    @property
    def time_is_over(self) -> bool:
        """Whether the process has had the time it was given."""
        return self._end is not None and time.monotonic() >= self._end

    def listen(self) -> None:
        """Take requests from now on; each ends the process."""
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_to_parent)
        for number in handled_signals():
            if number is not signal.SIGINT:
                signal.signal(number, _nothing)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        threading.Thread(target=self._take, name="stop requests", daemon=True).start()

    def remember(self) -> None:
        """Remember requests from now on: the process trains, and saves before it ends."""
        with self._lock:
            self._remembers = True
        if self._writer >= 0:
            signal.signal(signal.SIGINT, _nothing)

    def end_at_once(self) -> None:
        """End the process at a request again: all that was trained is saved, or given up."""
        with self._lock:
            self._remembers = False
            if self.signal is not None:
                self._leave(f"asked by {self.signal.name}", self.signal)
        if self._writer >= 0:
            os.write(self._writer, bytes(1))  # the thread looks at the time again

    def _leave_to_parent(self) -> None:
        """In a child that was forked: its signals are not this process's."""
        signal.set_wakeup_fd(-1)

    def _take(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], self._patience())
            with self._lock:
                if ready:
                    received = os.read(self._reader, 64)
                    for number in STOP_SIGNALS:
                        if number in received:
                            self._received(number)
                elif not self._remembers:
                    self._leave("--exit-duration-in-mins is over")

    def _patience(self) -> float | None:
        """Seconds until the time is over, None where nothing happens then."""
        if self._end is None or self._remembers:
            return None
        end = self._end + (0.0 if self._is_first else FIRST_RANK_LEAD_SECONDS)
        return max(0.0, end - time.monotonic())

    def _received(self, number: signal.Signals) -> None:
        if not self._remembers:
            self._leave(f"asked by {number.name}", number)
        if number is signal.SIGINT:
            now, before = time.monotonic(), self._interrupted
            if self.signal is signal.SIGINT and now - before > SECOND_INTERRUPT_SECONDS:
                os._exit(EXIT_INTERRUPTED)
            if self.signal is not signal.SIGINT:
                self._interrupted = now
        self.signal = number

    def _leave(self, why: str, number: signal.Signals | None = None) -> None:
        """End the process, of which nothing is to be saved."""
        if self._is_first:
            with contextlib.suppress(OSError):  # past buffers, which the main thread may hold
                os.write(1, f"stopped: {why}; there is nothing new to save\n".encode())
        os._exit(EXIT_INTERRUPTED if number is signal.SIGINT else EXIT_REQUEUE)


def _nothing(*_: object) -> None:
    """The thread acts."""
