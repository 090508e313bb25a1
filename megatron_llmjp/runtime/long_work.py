"""Work that takes one rank much longer than the others, such as writing to a slow disk.

A collective of training gives up after ``distributed_timeout_minutes``. Before ranks meet in one
after such work, they wait here instead, as long as it takes: a rank that does nothing any more is
found by the watchdog (``training/watchdog.py``), to which the work gives heartbeats, and one that
is gone closes its connections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_llmjp.system import no_heartbeat

LONGEST = timedelta(days=30)
"""No limit in practice; gloo wants one."""


@dataclass(frozen=True)
class LongWork:
    """How ranks do long work together: its heartbeats, and the group that they wait in."""

    beat: Callable[[], None] = no_heartbeat
    """Called after each piece of work, from any thread."""
    group: Any = None
    """Of all ranks, over gloo, without a limit (:func:`patient_group`); None for the default
    group, whose limit then holds."""

    def wait_for_all(self) -> None:
        """Return when every rank has come here; a collective."""
        dist.barrier(self.group)

    def first_rank_does(self, action: Callable[[], None]) -> None:
        """Have the first rank act; its failure is every rank's, so that none waits for another.

        Raises:
            Exception: whatever the action raised, on all ranks.
        """
        failed: list[Exception | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except Exception as error:
                failed = [error]
        dist.broadcast_object_list(failed, src=0, group=self.group)
        if failed[0] is not None:
            raise failed[0]


UNWATCHED = LongWork()


def patient_group() -> Any:
    """A new group of all ranks over gloo, in which they may wait for each other for days."""
    return dist.new_group(backend="gloo", timeout=LONGEST)
