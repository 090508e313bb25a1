"""Why a run stops before its end: a signal, a clock or a file. All ranks learn it together.

A rank that is asked to stop cannot just stop: the others would wait for it in the next collective.
So every iteration ends with a one-number agreement among all ranks, over gloo. The agreement of one
iteration is collected in the next: nobody waits for it, and a request that reached any rank takes
effect on all of them one iteration later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE
from megatron_llmjp.parallel.signals import StopRequests

STOP_FILE = "stop"
"""A file of this name in the save folder stops the run."""

SECONDS_BETWEEN_LOOKS = 2.0
"""The stop file is on a shared file system: it is not looked for more often."""


SECONDS_BETWEEN_VOTES = 0.2
"""While ranks wait for each other."""


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

    def __init__(
        self, save: str | None, requests: StopRequests, is_first: bool, group: Any
    ) -> None:
        """Agree in ``group``, of all ranks over gloo, on what reaches this one.

        Args:
            save: the save folder, which may hold the stop file; None for a run that saves nothing.
            requests: that reach this process.
            is_first: whether this rank looks at the clock and for the stop file.
            group: of all ranks.
        """
        self._requests = requests
        self._file = Path(save) / STOP_FILE if save is not None else None
        self._is_first = is_first
        self._looked = 0.0
        self._group = group
        self._vote = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self._agreed = Request.NONE

    def watch(self) -> None:
        """Take requests from now on; they no longer end the process at once.

        A run that saves nothing has nothing to do before it ends: signals end it as they come.
        """
        if self._file is not None:
            self._requests.remember()

    def rest(self) -> None:
        """Have requests end the process at once: nothing is trained that is not saved."""
        self._requests.end_at_once()

    def close(self) -> None:
        """Collect the last agreement."""
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

    def wait_until(self, ready: Callable[[], bool]) -> bool:
        """Wait until something is ready on every rank, unless they agree to stop; all call it.

        They meet several times a second: no collective waits as long as the slowest rank takes.

        Returns:
            Whether it is ready; else :meth:`agreed` returns why to stop.
        """
        while True:
            votes = torch.tensor([int(not ready()), int(self._own())], dtype=torch.int32)
            dist.all_reduce(votes, dist.ReduceOp.MAX, self._group)
            missing, request = votes.tolist()
            if missing and request:
                self._agreed = Request(request)
            if request or not missing:
                return not missing
            time.sleep(SECONDS_BETWEEN_VOTES)

    def answered(self, request: Request) -> None:
        """Remove the stop file, so that the next run is not stopped by it too."""
        if request is Request.FILE and self._is_first and self._file is not None:
            self._file.unlink(missing_ok=True)

    def _own(self) -> Request:
        if self._requests.signal is not None:
            return Request.SIGNAL
        if not self._is_first:
            return Request.NONE
        if self._requests.time_is_over:
            return Request.DURATION
        now = time.monotonic()
        if self._file is not None and now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = now
            if self._file.exists():
                return Request.FILE
        return Request.NONE
