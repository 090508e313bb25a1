"""Reads a rank's share of a checkpoint with several threads, and its index without trusting it.

torch's reader takes one tensor after the other, so that the disk waits while a tensor is copied to
its place and the other way round: half of a disk's speed is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.futures import Future

from megatron_llmjp.checkpoint.safety import read_index
from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    from megatron.core.dist_checkpointing.strategies import torch as core
    from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
        CachedMetadataFileSystemReader,
    )

READERS = 4
"""Threads of a rank that read at the same time."""


class ThreadedReader(CachedMetadataFileSystemReader):
    """torch's reader of a folder, several times at once."""

    _cached_metadata: Metadata | None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Open the index by our own unpickler; it executes nothing."""
        if self._cached_metadata is None:
            index: Metadata = read_index(Path(self.path))
            index.storage_meta = index.storage_meta or StorageMeta()
            index.storage_meta.load_id = self.load_id
            self._cached_metadata = index
        return self._cached_metadata

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        """Read what the plan names, each thread a share of about the same size."""
        shares: list[list[Any]] = [[] for _ in range(READERS)]
        loads = [0] * READERS
        lengths = {id(item): self.storage_data[item.storage_index].length for item in plan.items}
        for item in sorted(plan.items, key=lambda item: -lengths[id(item)]):
            least = loads.index(min(loads))
            shares[least].append(item)
            loads[least] += lengths[id(item)]

        def read(items: list[Any]) -> None:
            items.sort(key=lambda item: self.storage_data[item.storage_index].offset)
            super(ThreadedReader, self).read_data(replace(plan, items=items), planner)

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, shares))
        done: Future[None] = Future()
        done.set_result(None)
        return done


@contextmanager
def threaded_reading() -> Iterator[None]:
    """Have megatron-core's torch_dist format read through :class:`ThreadedReader`.

    megatron-core makes its reader in a function of its own and takes none as an argument.
    """
    make = core._get_filesystem_reader
    core._get_filesystem_reader = lambda folder, cache_metadata=False: ThreadedReader(folder)
    try:
        yield
    finally:
        core._get_filesystem_reader = make
