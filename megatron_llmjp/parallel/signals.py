"""Stop requests of a process: signals and the time limit of the run.

A thread handles them. Python runs signal handlers on the main thread only, between two bytecode
instructions, while a rank may wait inside a collective or for the store for hours.
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
"""From Slurm before it kills a job, from ``sbatch --signal``, a closed terminal, and Ctrl-C. Each
requests to save a checkpoint and stop."""

SECOND_INTERRUPT_SECONDS = 1.0
"""A second SIGINT within this time is the same Ctrl-C, sent by the terminal and by a launcher."""

FIRST_RANK_LEAD_SECONDS = 10.0
"""When the time limit is reached before training, other ranks exit this much after rank 0, whose
message is then printed."""


def handled_signals() -> tuple[signal.Signals, ...]:
    """Return the stop signals; without SIGHUP if ``nohup`` set it to be ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (ignored and number is signal.SIGHUP))


class StopRequests:
    """Exits the process at a stop request or, during training, stores the request."""

    def __init__(self, is_first: bool = True, end: float | None = None) -> None:
        """Initialize without listening.

        Args:
            is_first: whether this is rank 0, which prints the reason.
            end: time limit as a value of ``time.monotonic()``.
        """
        self.signal: signal.Signals | None = None
        """The last stop signal that was stored during training."""
        self._is_first, self._end = is_first, end
        self._is_training = False
        self._interrupted = -float("inf")
        self._lock = threading.Lock()
        self._reader = self._writer = -1

    @property
    def time_limit_reached(self) -> bool:
        """Whether the time limit of the run is reached."""
        return self._end is not None and time.monotonic() >= self._end

    def listen(self) -> None:
        """Start listening; until :meth:`defer`, a request exits the process."""
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_ignore_signals_in_child)
        for number in handled_signals():
            if number is not signal.SIGINT:
                signal.signal(number, _ignore)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        threading.Thread(target=self._listen, name="stop requests", daemon=True).start()

    def defer(self) -> None:
        """Store requests from now on: training checks them and saves before it exits."""
        with self._lock:
            self._is_training = True
        if self._writer >= 0:
            signal.signal(signal.SIGINT, _ignore)

    def exit_immediately(self) -> None:
        """Exit at a request again, also one that is stored: there is nothing left to save."""
        with self._lock:
            self._is_training = False
            if self.signal is not None:
                self._exit(f"received {self.signal.name}", self.signal)
        if self._writer >= 0:
            os.write(self._writer, bytes(1))  # wakes the thread, which computes its timeout again

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], self._timeout())
            with self._lock:
                if ready:
                    received = os.read(self._reader, 64)
                    for number in STOP_SIGNALS:
                        if number in received:
                            self._handle(number)
                elif not self._is_training:
                    self._exit("--exit-duration-in-mins reached")

    def _timeout(self) -> float | None:
        """Seconds until the process exits at the time limit; None if it does not."""
        if self._end is None or self._is_training:
            return None
        end = self._end + (0.0 if self._is_first else FIRST_RANK_LEAD_SECONDS)
        return max(0.0, end - time.monotonic())

    def _handle(self, number: signal.Signals) -> None:
        if not self._is_training:
            self._exit(f"received {number.name}", number)
        if number is signal.SIGINT:
            now, before = time.monotonic(), self._interrupted
            if self.signal is signal.SIGINT and now - before > SECOND_INTERRUPT_SECONDS:
                os._exit(EXIT_INTERRUPTED)
            if self.signal is not signal.SIGINT:
                self._interrupted = now
        self.signal = number

    def _exit(self, reason: str, number: signal.Signals | None = None) -> None:
        """Exit the process without saving."""
        if self._is_first:
            with contextlib.suppress(OSError):  # unbuffered: the main thread may hold the buffer
                os.write(1, f"stopped: {reason}; nothing new to save\n".encode())
        os._exit(EXIT_INTERRUPTED if number is signal.SIGINT else EXIT_REQUEUE)


def _ignore(*_: object) -> None:
    """Signal handler without effect: the thread reads the signal from the wakeup descriptor."""


def _ignore_signals_in_child() -> None:
    """Detach a forked child process from the wakeup descriptor of its parent."""
    signal.set_wakeup_fd(-1)
