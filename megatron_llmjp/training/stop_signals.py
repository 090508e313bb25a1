"""Stop requests of a run (signals, time limit, stop file), saves that are due by time, and the
agreement of ranks on them.

A rank that receives a request cannot stop alone: the others would wait for it in the next
collective. Nor can it save alone when its clock says so. Every iteration therefore ends with an
all-reduce of two integers over gloo. Its result is read in the next iteration, so that no rank
waits for it, and a request that reaches any rank takes effect on all ranks one iteration later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_llmjp.checkpoint.retention import SaveKind
from megatron_llmjp.checkpoint.save_clock import SaveClock
from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE
from megatron_llmjp.parallel.signals import StopRequests

STOP_FILE = "stop"
"""Name of the file in the save folder that stops the run."""

STOP_FILE_POLL_SECONDS = 2.0
"""Shortest time between two checks for the stop file, which is on a shared file system."""

WAIT_POLL_SECONDS = 0.2
"""Time between two votes of :meth:`StopCoordinator.wait_until`."""


class StopReason(IntEnum):
    """Reason to stop; of several requests in one iteration the greatest takes effect."""

    NONE = 0
    FILE = 1
    INTERVAL = 2
    DURATION = 3
    SIGNAL = 4

    @property
    def description(self) -> str:
        """The reason as shown in the log; empty for ``NONE``."""
        return {
            StopReason.FILE: f"file '{STOP_FILE}' found in the save folder",
            StopReason.INTERVAL: "--exit-interval reached",
            StopReason.DURATION: "--exit-duration-in-mins reached",
            StopReason.SIGNAL: "signal received",
        }.get(self, "")

    @property
    def exit_code(self) -> int:
        """Exit code of the run; only a stop file prevents a requeue."""
        return EXIT_DONE if self is StopReason.FILE else EXIT_REQUEUE

    @property
    def is_interruption(self) -> bool:
        """Whether the run was interrupted where nobody chose to: it continues from there."""
        return self in (StopReason.DURATION, StopReason.SIGNAL)


class StopCoordinator:
    """Collect stop requests and due saves on this rank, and agree on them with all other ranks."""

    def __init__(
        self,
        save: str | None,
        requests: StopRequests,
        is_first: bool,
        group: Any,
        clock: SaveClock | None = None,
    ) -> None:
        """Create a coordinator; it has no effect on signals before :meth:`defer_signals`.

        Args:
            save: the save folder, where the stop file is looked for; None for a run without one.
            requests: requests that this process receives.
            is_first: whether this rank checks the time limit, the stop file and ``clock``.
            group: gloo group of all ranks.
            clock: clock of the saves that are due by time; None if there are none.
        """
        self._requests = requests
        self._file = Path(save) / STOP_FILE if save is not None else None
        self._is_first = is_first
        self._last_file_check = 0.0
        self._group = group
        self._vote = torch.zeros(2, dtype=torch.int32)
        self._pending: Any = None
        self._agreed = StopReason.NONE
        self._clock = clock
        self._due_save = SaveKind.NONE
        self._vote_is_older = False
        """Whether the pending vote on a save was cast before the last save."""

    def defer_signals(self) -> None:
        """Record signals from now on, so that the run saves before it ends.

        In a run without a save folder signals keep ending the process immediately.
        """
        if self._file is not None:
            self._requests.defer()

    def end_on_signal(self) -> None:
        """Let signals end the process immediately: there is nothing new to save."""
        self._requests.exit_immediately()

    def close(self) -> None:
        """Wait for the pending all-reduce."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def agreed(self) -> StopReason:
        """Return the reason that all ranks agreed on; all ranks must call it equally often."""
        if self._agreed is StopReason.NONE:
            if self._pending is not None:
                self._pending.wait()
            reason, save = self._vote.tolist()
            self._agreed = StopReason(reason)
            if not self._vote_is_older:
                self._due_save = max(self._due_save, SaveKind(save))
            self._vote_is_older = False
            self._vote[0], self._vote[1] = self._local_reason(), self._local_save()
            op = dist.ReduceOp.MAX
            self._pending = dist.all_reduce(self._vote, op, self._group, async_op=True)
        return self._agreed

    def timed_save(self) -> SaveKind:
        """Return the save that all ranks agreed is due by time; call it once per iteration."""
        if self._clock is not None:
            self._clock.step()
        return self._due_save

    def restart_save_clock(self, kind: SaveKind = SaveKind.PERSISTENT) -> None:
        """Count the time to the next save from now on; all ranks call it.

        Args:
            kind: of the save after which training continues; by default that of a start.
        """
        if self._clock is not None:
            self._clock.restart(kind)
        self._due_save = SaveKind.NONE
        self._vote_is_older = True

    def wait_until(self, ready: Callable[[], bool]) -> bool:
        """Wait until ``ready`` is true on all ranks or they agree to stop; all ranks call it.

        Ranks vote several times a second, so that no collective has to wait for the slowest rank.

        Returns:
            Whether all ranks are ready; if not, :meth:`agreed` returns the reason to stop.
        """
        while True:
            votes = torch.tensor([int(not ready()), int(self._local_reason())], dtype=torch.int32)
            dist.all_reduce(votes, dist.ReduceOp.MAX, self._group)
            not_ready, reason = votes.tolist()
            if not_ready and reason:
                self._agreed = StopReason(reason)
            if reason or not not_ready:
                return not not_ready
            time.sleep(WAIT_POLL_SECONDS)

    def acknowledge(self, reason: StopReason) -> None:
        """Remove the stop file if it was the reason, so that it does not stop the next run."""
        if reason is StopReason.FILE and self._is_first and self._file is not None:
            self._file.unlink(missing_ok=True)

    def _local_save(self) -> SaveKind:
        return self._clock.due() if self._is_first and self._clock else SaveKind.NONE

    def _local_reason(self) -> StopReason:
        if self._requests.signal is not None:
            return StopReason.SIGNAL
        if not self._is_first:
            return StopReason.NONE
        if self._requests.time_limit_reached:
            return StopReason.DURATION
        now = time.monotonic()
        if self._file is not None and now - self._last_file_check >= STOP_FILE_POLL_SECONDS:
            self._last_file_check = now
            if self._file.exists():
                return StopReason.FILE
        return StopReason.NONE
