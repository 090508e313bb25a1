"""Whether a run may go on: it is asked to stop, or it hangs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_llmjp.config.schema import Config
from megatron_llmjp.runtime.ranks import Ranks
from megatron_llmjp.training.guard import Guard
from megatron_llmjp.training.watchdog import Watchdog

STACKS = "hang"
"""Folder of stacks in the save folder."""

SHARE_OF_TIMEOUT = 0.8
"""A hang is told before a collective gives up, which tells less."""


class Watch(NamedTuple):
    """The two that watch a run."""

    guard: Guard
    watchdog: Watchdog


@contextmanager
def watched(config: Config, ranks: Ranks, store: Any) -> Iterator[Watch]:
    """Watch from now on: take requests to stop, and end the run if it hangs.

    Args:
        config: the run.
        ranks: this process's place.
        store: shared by all ranks.
    """
    minutes = config.faults.hang_timeout_minutes
    if minutes is None:
        minutes = SHARE_OF_TIMEOUT * config.parallel.distributed_timeout_minutes
    save = config.checkpoint.save
    logs = Path(save) / STACKS if save is not None else None
    guard = Guard(config, time.monotonic(), ranks.is_first)
    watchdog = Watchdog(store, ranks.rank, ranks.world_size, minutes, logs)
    guard.watch()
    if minutes > 0:
        watchdog.start()
    yield Watch(guard, watchdog)
    # Not after an error: the other ranks may be gone, and closing would wait for them.
    watchdog.close()
    guard.close()
