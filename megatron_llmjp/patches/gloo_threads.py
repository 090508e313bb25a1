"""One worker thread for each gloo process group.

What: ``ProcessGroupGloo`` is created with one worker thread instead of two.

Why: the workers of a group assign the name of the operation they start to one ``std::string``
without a lock (``runLoop`` of ``ProcessGroupGloo.cpp``). Names of more than 15 characters, such as
``ALLGATHER_COALESCED`` of the distributed optimizer, are on the heap: two operations that start at
the same time free it twice, and the process aborts with "malloc(): unaligned tcache chunk
detected" or trains on with a damaged heap. Seen within a minute with ``--overlap-param-gather`` on
eight processes; two processes that only gather in this way abort within seconds.

With one worker, the collectives of a group run in the order in which they were started, as with
NCCL. Sends and receives do not use the workers.

Remove when the workers no longer share that string, or groups have one worker by default. Not the
case in torch 2.13.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_REPLACED: list[Any] = []  # the original constructor
_DEFAULT_TIMEOUT = timedelta(minutes=30)


def use_one_gloo_thread() -> None:
    """Create further gloo groups with one worker thread. Calling it again does nothing."""
    if not _REPLACED:
        group: Any = dist.ProcessGroupGloo
        _REPLACED.append(group.__init__)
        group.__init__ = _initialize


def _initialize(
    self: Any,
    store: Any,
    rank: int,
    size: int,
    options: Any = None,
    timeout: timedelta = _DEFAULT_TIMEOUT,
) -> None:
    if isinstance(options, timedelta):  # the fourth argument of the other constructor
        options, timeout = None, options
    if options is None:
        group: Any = dist.ProcessGroupGloo
        options = group._Options()
        options._timeout = timeout
        options._devices = _devices()
    options._threads = 1
    _REPLACED[0](self, store, rank, size, options)


def _devices() -> list[Any]:
    """Return the network devices that the original constructor chooses."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    group = dist.ProcessGroupGloo
    if names:
        return [group.create_device(interface=name) for name in names.split(",")]
    return [group.create_default_device()]
