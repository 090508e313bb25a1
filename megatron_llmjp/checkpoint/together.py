"""What one rank does for all."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist


def first_rank_does(action: Callable[[], None]) -> None:
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
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise failed[0]
