"""What watches a run: whether it is asked to stop, and whether it hangs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_llmjp.config.schema import Config
from megatron_llmjp.runtime.long_work import LongWork
from megatron_llmjp.runtime.ranks import Ranks
from megatron_llmjp.training.guard import Guard
from megatron_llmjp.training.watchdog import Watchdog

STACKS = "hang"
"""Folder of stacks in the save folder."""

SHARE_OF_TIMEOUT = 0.8
"""A hang is told before a collective gives up, which tells less."""


class Watch(NamedTuple):
    """What watches a run."""

    guard: Guard
    watchdog: Watchdog
    work: LongWork
    """Heartbeats for the watchdog, and the group that ranks wait in for each other."""


@contextmanager
def watched(config: Config, ranks: Ranks, store: Any) -> Iterator[Watchdog]:
    """End the run if it hangs, from now on.

    Args:
        config: the run.
        ranks: this process's place.
        store: shared by all ranks.
    """
    minutes = config.faults.hang_timeout_minutes
    if minutes is None:
        minutes = SHARE_OF_TIMEOUT * config.parallel.distributed_timeout_minutes
    save = config.checkpoint.save
    logs = Path(save) / STACKS if save is not None and not config.training.eval_only else None
    watchdog = Watchdog(store, ranks.rank, ranks.world_size, minutes, logs)
    watchdog.start()
    yield watchdog
    # Not after an error: the other ranks may be gone, and closing would wait for them.
    watchdog.close()
