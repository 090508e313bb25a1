"""Multi-threaded writer of torch_dist checkpoints, with checksums.

Planning, file names and the index (``.metadata``) are megatron-core's; writing the files is not.
megatron-core starts a manager process and two writer processes per rank. They outlive a killed rank
and keep writing into its folder, wait forever for a killed writer process, and compute no
checksums. This writer uses threads, which end with their rank; errors are exceptions; and checksums
are computed while writing, so that files need not be read again.
"""

from __future__ import annotations

import io
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.exchange_utils import (
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)

from megatron_llmjp.checkpoint.host_copy import HostBuffers, compact_on_host
from megatron_llmjp.checkpoint.manifest import FileEntry
from megatron_llmjp.filesystem import name_path_in_errors, no_heartbeat
from megatron_llmjp.parallel.process_groups import DEFAULT_RANK_SYNC, RankSync

FILES_PER_RANK = 2
"""Files that a rank writes in parallel, as in megatron-core."""
BLOCK_BYTES = 1 << 20
"""Bytes per write call; each is followed by a heartbeat."""
SYNC_BYTES = 256 << 20
"""Bytes between two fsync calls: a single fsync of a large file on a slow disk could take many
minutes without a heartbeat."""


class NotFiniteError(Exception):
    """A tensor to be saved contains NaN or Inf."""


class ThreadedWriter(FileSystemWriterAsync):
    """megatron-core's storage writer with threads instead of processes, and with checksums."""

    def __init__(self, folder: Path, beat: Callable[[], None] = no_heartbeat) -> None:
        """Write into ``folder``; ``beat`` is called after each block, from any thread."""
        super().__init__(str(folder), thread_count=FILES_PER_RANK)
        self._beat = beat
        self.entries: dict[str, FileEntry] = {}
        """Sizes and checksums of this rank's files, set by :meth:`write`."""
        self._folder = folder
        self._host: HostBuffers | None = None
        self._files: dict[str, list[tuple[Any, Any]]] = {}
        self._results: list[Any] = []
        self._error: Exception | None = None

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Assign this rank's tensors and objects to files, without copying."""
        buckets = _split_by_size_and_type(FILES_PER_RANK, plan.items)
        for number, items in enumerate(items for items in buckets if items):
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            self._files[name] = [(item, planner.resolve_data(item)) for item in items]

    def copy_to(self, host: HostBuffers) -> None:
        """Start to copy all tensors to host memory.

        Training must not change them before ``host.hold_device`` or ``host.wait``.
        """
        with host.copying():
            for name, items in self._files.items():
                copies = []
                for number, (item, data) in enumerate(items):
                    is_tensor = isinstance(data, Tensor)
                    copies.append((item, host.copy((name, number), data) if is_tensor else data))
                    self._beat()
                self._files[name] = copies
        self._host = host

    def write(self) -> None:
        """Write this rank's files and sync them to disk; an error is stored for finalization."""
        try:
            if self._host is not None:
                self._host.wait()
            with _without_archive_checksums(), ThreadPoolExecutor(FILES_PER_RANK) as pool:
                done = list(pool.map(self._write_file, self._files))
            for name, (results, entry) in zip(self._files, done, strict=True):
                self._results += results
                self.entries[name] = entry
        except Exception as error:
            self._error = error
        self._files = {}

    def retrieve_write_results(self) -> Any:
        """Return the results that megatron-core gathers for the index, or the error."""
        return self._results if self._error is None else _wrap_exception(self._error)

    def finish(self, metadata: Any, results: Any) -> None:
        """Write the index, without the plans that megatron-core adds for caching."""
        if hasattr(metadata, "all_local_plans"):
            del metadata.all_local_plans
        super().finish(metadata, results)

    def _write_file(self, name: str) -> tuple[list[Any], FileEntry]:
        path = self._folder / name
        with name_path_in_errors(path), _checksum_stream(path, self._beat) as stream:
            try:
                return self._write_items(name, stream), stream.entry
            except Exception:
                # torch's archive writer reports any failed write as "unexpected pos".
                if stream.error is not None:
                    raise stream.error from None
                raise

    def _write_items(self, name: str, stream: _ChecksumStream) -> list[Any]:
        results = []
        for item, data in self._files[name]:
            if isinstance(data, Tensor):
                data = compact_on_host(data)
                _require_finite(item.index.fqn, data)
            transforms, kind = _StorageWriterTransforms(), SerializationFormat.TORCH_SAVE
            results.append(_write_item(transforms, stream, data, item, name, kind))
        return results


class ThreadAsyncCaller(AsyncCaller):
    """Runs megatron-core's asynchronous requests in a thread of this process."""

    def __init__(self, sync: RankSync = DEFAULT_RANK_SYNC) -> None:
        self._sync = sync
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Start the writer thread; tensors must have been copied."""
        self._thread = threading.Thread(target=async_req.async_fn, name="checkpoint", daemon=True)
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool, no_dist: bool) -> bool:
        """Whether all ranks have finished writing; a collective unless ``no_dist``."""
        if blocking:
            self.close()
            if not no_dist:
                self._sync.barrier()
            return True
        alive = self._thread is not None and self._thread.is_alive()
        return not alive if no_dist else bool(self.sync_all_async_calls(int(alive)))

    def close(self, abort: bool = False) -> None:
        """Wait for the thread, which cannot be aborted."""
        if self._thread is not None and not abort:
            self._thread.join()

    def __del__(self) -> None:
        """Override the destructor of the base class, which is not implemented."""


def plan_write(
    sharded: Any, folder: Path, beat: Callable[[], None] = no_heartbeat
) -> tuple[ThreadedWriter, AsyncRequest]:
    """Assign tensors to ranks and files; a collective. ``beat`` is called after each block.

    Tensors that all ranks of a data-parallel group hold, such as the weights, are distributed over
    these ranks, so that all write about the same number of bytes.

    Returns:
        This rank's writer, and a request whose function writes the files and whose finalization, a
        collective, writes the index or raises torch's ``CheckpointException`` on all ranks.
    """
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    distribution = determine_main_replica_uniform_distribution(sharded, replicas)
    distribute_main_replicas_with_precomputed_distribution(sharded, replicas, distribution)
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    writer = ThreadedWriter(folder, beat)
    state, *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(flat, False),
        writer,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    return writer, AsyncRequest(writer.write, (), [lambda: save_state_dict_async_finalize(*state)])


class _ChecksumStream(io.RawIOBase):
    """Output stream of a file that computes size and CRC-32 of the data."""

    def __init__(self, stream: io.FileIO, beat: Callable[[], None]) -> None:
        self.error: OSError | None = None
        """Error of a failed write."""
        self._stream, self._beat = stream, beat
        self._crc = self._size = self._synced = 0

    @property
    def entry(self) -> FileEntry:
        """Size and checksum of the data written so far."""
        return FileEntry(bytes=self._size, crc32=f"{self._crc:08x}")

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            # In blocks, so that a block is still in the CPU cache when its checksum is computed.
            try:
                written = self._stream.write(rest[:BLOCK_BYTES])
                self._size += written
                if self._size - self._synced >= SYNC_BYTES:
                    self.sync()
            except OSError as error:
                self.error = error
                raise
            self._crc = zlib.crc32(rest[:written], self._crc)
            rest = rest[written:]
            self._beat()
        return size

    def sync(self) -> None:
        """Sync the data written so far to disk."""
        os.fsync(self._stream.fileno())
        self._synced = self._size


@contextmanager
def _without_archive_checksums() -> Iterator[None]:
    """Disable the checksums in ``torch.save``, which ``torch.load`` does not verify."""
    previous = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(previous)


@contextmanager
def _checksum_stream(path: Path, beat: Callable[[], None]) -> Iterator[_ChecksumStream]:
    with path.open("wb", buffering=0) as stream:
        summed = _ChecksumStream(stream, beat)
        yield summed
        summed.sync()
        beat()


def _require_finite(name: str, tensor: Tensor) -> None:
    """Check for NaN and Inf in one pass without a copy.

    Raises:
        NotFiniteError: the tensor contains NaN or Inf.
    """
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFiniteError(f"{name} contains NaN or Inf")
