"""Multi-threaded reader of torch_dist checkpoints, with restricted unpickling of the index.

torch's reader reads one tensor after another into new memory and then copies it to its target:
reading and copying alternate, at about half of a disk's throughput. This reader uses several
threads, and reads a tensor directly into its target if it is stored in the same form.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch.distributed.checkpoint.filesystem import _create_file_view
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from megatron_llmjp.checkpoint.safe_unpickling import read_index
from megatron_llmjp.parallel.process_groups import DEFAULT_RANK_SYNC, RankSync
from megatron_llmjp.patches.checkpoint_reader import storage_reader

READER_THREADS = 4
"""Reader threads per rank."""
READ_IN_PLACE_BYTES = 1 << 20
"""Minimum size of a tensor that is read directly into its target; locating it costs time."""
READ_CALL_BYTES = 64 << 20
"""Bytes per read call; each is followed by a heartbeat."""


class ThreadedReader(CachedMetadataFileSystemReader):
    """Storage reader of a torch_dist folder with several threads."""

    _cached_metadata: Metadata | None

    def __init__(self, folder: str, sync: RankSync = DEFAULT_RANK_SYNC) -> None:
        """Read from ``folder``; ``sync`` provides heartbeats, and barriers without a timeout."""
        super().__init__(folder)
        self._sync = sync

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Load the index with the restricted unpickler."""
        if self._cached_metadata is None:
            index: Metadata = read_index(Path(self.path))
            index.storage_meta = index.storage_meta or StorageMeta()
            index.storage_meta.load_id = self.load_id
            self._cached_metadata = index
        return self._cached_metadata

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        """Read the items of a plan; each thread reads about the same number of bytes."""
        shares: list[list[Any]] = [[] for _ in range(READER_THREADS)]
        loads = [0] * READER_THREADS
        lengths = {id(item): self.storage_data[item.storage_index].length for item in plan.items}
        for item in sorted(plan.items, key=lambda item: -lengths[id(item)]):
            least = loads.index(min(loads))
            shares[least].append(item)
            loads[least] += lengths[id(item)]

        def read(items: list[Any]) -> None:
            items.sort(key=lambda item: self.storage_data[item.storage_index].offset)
            rest = [item for item in items if not self._read_in_place(item, planner)]
            super(ThreadedReader, self).read_data(replace(plan, items=rest), planner)

        try:
            with ThreadPoolExecutor(READER_THREADS) as pool:
                list(pool.map(read, shares))
        finally:
            self._sync.barrier()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _slice_file(self, file: Any, place: Any) -> Any:
        """Open one item of torch's reader, with a heartbeat for the previous one."""
        self._sync.beat()
        return super()._slice_file(file, place)

    def _read_in_place(self, item: Any, planner: Any) -> bool:
        """Read a large tensor directly into its target if the stored form is the same."""
        place = self.storage_data[item.storage_index]
        if item.type is not LoadItemType.TENSOR or place.length < READ_IN_PLACE_BYTES:
            return False
        target = planner.resolve_tensor(item).detach()
        if target.device.type != "cpu" or not target.is_contiguous():
            return False
        with (Path(self.path) / place.relative_path).open("rb", buffering=0) as stream:
            start = _data_offset(_create_file_view(stream, place.offset, place.length), target)
            if start is None:
                return False
            stream.seek(place.offset + start)
            rest = memoryview(target.view(-1).view(torch.uint8).numpy())
            while rest:
                count = stream.readinto(rest[:READ_CALL_BYTES])
                if not count:
                    raise EOFError(f"{stream.name} ends within a tensor")
                rest = rest[count:]
                self._sync.beat()
        planner.commit_tensor(item, target)
        return True


def _data_offset(archive: Any, target: torch.Tensor) -> int | None:
    """Return the offset of the tensor's bytes in an archive of ``torch.save``.

    None if dtype, shape or memory layout of the stored tensor differ from ``target``.
    """
    stored = torch.load(archive, map_location="meta", weights_only=True)
    is_same_form = (
        stored.dtype == target.dtype
        and stored.shape == target.shape
        and stored.is_contiguous()
        and stored.storage_offset() == 0
    )
    offset: int | None = getattr(stored.untyped_storage(), "_checkpoint_offset", None)
    return offset if is_same_form else None


def threaded_reading(sync: RankSync = DEFAULT_RANK_SYNC) -> AbstractContextManager[None]:
    """Make megatron-core read torch_dist checkpoints with :class:`ThreadedReader`."""
    return storage_reader(lambda folder: ThreadedReader(folder, sync))
