"""Why a run stops before its end: a signal, a clock or a file. All ranks learn it together.

A rank that is asked to stop cannot just stop: the others would wait for it in the next collective.
So every iteration ends with a one-number agreement among all ranks, on a group of its own over
gloo. The agreement of one iteration is collected in the next: nobody waits for it, and a request
that reached any rank takes effect on all of them one iteration later.
"""

from __future__ import annotations

import signal
import time
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE

STOP_FILE = "stop"
"""A file of this name in the save folder stops the run."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What Slurm sends before it takes a node away, what ``sbatch --signal`` sends, and Ctrl-C."""

SECONDS_BETWEEN_LOOKS = 2.0
"""The stop file is on a shared file system: it is not looked for more often."""


class Request(IntEnum):
    """Why to stop; of two requests of one iteration the greater counts."""

    NONE = 0
    FILE = 1
    INTERVAL = 2
    DURATION = 3
    SIGNAL = 4

    @property
    def why(self) -> str:
        """The reason in words."""
        return {
            Request.FILE: f"a file named '{STOP_FILE}' in the save folder asks for it",
            Request.INTERVAL: "--exit-interval asks for it",
            Request.DURATION: "--exit-duration-in-mins is over",
            Request.SIGNAL: "a signal asks for it",
        }.get(self, "")

    @property
    def exit_code(self) -> int:
        """A person who leaves a file wants no requeue; everything else does."""
        return EXIT_DONE if self is Request.FILE else EXIT_REQUEUE


class Guard:
    """Collects requests to stop on this rank and agrees on them with the others."""

    def __init__(self, config: Config, started: float, is_first: bool) -> None:
        """Join the group of all ranks; ``started`` is ``time.monotonic()`` of the run's start."""
        minutes = config.faults.exit_duration_in_mins
        save = config.checkpoint.save
        # Monotonic: a clock that is set right in the middle of a run must not end it.
        self._end = started + 60 * minutes if minutes is not None else None
        self._file = Path(save) / STOP_FILE if save is not None else None
        self._is_first = is_first
        self._signalled = False
        self._looked = 0.0
        self._previous: dict[int, Any] = {}
        timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._vote = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self._agreed = Request.NONE

    def watch(self) -> None:
        """Take requests from signals from now on; a second Ctrl-C ends the process at once.

        A run that saves nothing has nothing to do before it ends: signals end it as they come.
        """
        if self._file is None:
            return
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._take)

    def close(self) -> None:
        """Give the signals back and collect the last agreement."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def agreed(self) -> Request:
        """What all ranks agreed on so far; every rank must call it as often as the others."""
        if self._agreed is Request.NONE:
            if self._pending is not None:
                self._pending.wait()
            self._agreed = Request(int(self._vote.item()))
            self._vote.fill_(self._own())
            op = dist.ReduceOp.MAX
            self._pending = dist.all_reduce(self._vote, op, self._group, async_op=True)
        return self._agreed

    def answered(self, request: Request) -> None:
        """Remove the stop file, so that the next run is not stopped by it too."""
        if request is Request.FILE and self._is_first and self._file is not None:
            self._file.unlink(missing_ok=True)

    def _take(self, number: int, _: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _own(self) -> Request:
        if self._signalled:
            return Request.SIGNAL
        if not self._is_first:
            return Request.NONE
        now = time.monotonic()
        if self._end is not None and now >= self._end:
            return Request.DURATION
        if self._file is not None and now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = now
            if self._file.exists():
                return Request.FILE
        return Request.NONE
