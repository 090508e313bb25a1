"""Writes a rank's share of a checkpoint: the files of megatron-core's torch_dist format.

Planning, naming and the index (``.metadata``) are megatron-core's. How bytes reach the disk is not:
megatron-core starts a manager and two more processes per rank for it, which outlive a rank that is
killed and go on writing into its folder, wait for ever for one that was killed themselves, and
leave no checksums. Here threads write, which end with their rank; a failure is an exception; and
checksums are taken from the bytes on their way, so that a finished file is not read again.
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
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
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

from megatron_llmjp.checkpoint.manifest import FileEntry
from megatron_llmjp.filesystem import name_path_in_errors, no_heartbeat
from megatron_llmjp.parallel.process_groups import DEFAULT_RANK_SYNC, RankSync

FILES_PER_RANK = 2
"""Files that a rank writes at the same time, as in megatron-core."""
BLOCK_BYTES = 1 << 20
SYNC_BYTES = 256 << 20
"""What is written between two looks whether it is on disk: forcing a large file to a slow disk at
its end would be one call of many minutes, without a heartbeat."""


class NotFiniteError(Exception):
    """A tensor to be saved holds NaN or Inf: such a checkpoint is worse than none."""


class HostBuffers:
    """Copies of tensors in host memory, whose space serves one save after another.

    The space is kept because memory that the process has used before is filled several times faster
    than fresh memory, and training waits for it.
    """

    def __init__(self) -> None:
        self._space: dict[tuple[Any, ...], Tensor] = {}

    def take(self, key: tuple[Any, ...], tensor: Tensor) -> Tensor:
        """Start a copy of ``tensor``; complete after ``torch.cuda.synchronize``."""
        space = self._space.get(key)
        if space is None or space.shape != tensor.shape or space.dtype != tensor.dtype:
            on_gpu = tensor.device.type == "cuda"
            space = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            self._space[key] = space
        space.copy_(tensor, non_blocking=True)
        return space


class ThreadedWriter(FileSystemWriterAsync):
    """megatron-core's storage writer with threads in place of processes, and with checksums."""

    def __init__(self, folder: Path, beat: Callable[[], None] = no_heartbeat) -> None:
        """Write into ``folder``; ``beat`` is called after each block, from any thread."""
        super().__init__(str(folder), thread_count=FILES_PER_RANK)
        self._beat = beat
        self.entries: dict[str, FileEntry] = {}
        """Sizes and checksums of this rank's files, when they are written."""
        self._folder = folder
        self._files: dict[str, list[tuple[Any, Any]]] = {}
        self._results: list[Any] = []
        self._error: Exception | None = None

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Note which of this rank's tensors and objects go to which file; copies nothing."""
        buckets = _split_by_size_and_type(FILES_PER_RANK, plan.items)
        for number, items in enumerate(items for items in buckets if items):
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            self._files[name] = [(item, planner.resolve_data(item)) for item in items]

    def copy_to(self, host: HostBuffers) -> None:
        """Take copies of all tensors, after which training may change them."""
        for name, items in self._files.items():
            copies = []
            for number, (item, data) in enumerate(items):
                is_tensor = isinstance(data, Tensor)
                copies.append((item, host.take((name, number), data) if is_tensor else data))
                self._beat()
            self._files[name] = copies
        torch.cuda.synchronize()

    def write(self) -> None:
        """Write this rank's files and force them to disk; errors are kept for the end."""
        try:
            with _without_archive_checksums(), ThreadPoolExecutor(FILES_PER_RANK) as pool:
                done = list(pool.map(self._write_file, self._files))
            for name, (results, entry) in zip(self._files, done, strict=True):
                self._results += results
                self.entries[name] = entry
        except Exception as error:
            self._error = error
        self._files = {}

    def retrieve_write_results(self) -> Any:
        """What megatron-core gathers for the index, or the error."""
        return self._results if self._error is None else _wrap_exception(self._error)

    def finish(self, metadata: Any, results: Any) -> None:
        """Write the index, without the plans that megatron-core adds for its own caching."""
        if hasattr(metadata, "all_local_plans"):
            del metadata.all_local_plans
        super().finish(metadata, results)

    def _write_file(self, name: str) -> tuple[list[Any], FileEntry]:
        path = self._folder / name
        with name_path_in_errors(path), _checksum_stream(path, self._beat) as stream:
            try:
                return self._write_items(name, stream), stream.entry
            except Exception:
                # torch's archive writer reports a write that failed as "unexpected pos".
                if stream.error is not None:
                    raise stream.error from None
                raise

    def _write_items(self, name: str, stream: _ChecksumStream) -> list[Any]:
        results = []
        for item, data in self._files[name]:
            if isinstance(data, Tensor):
                data = _compact_on_host(data)
                _require_finite(item.index.fqn, data)
            transforms, kind = _StorageWriterTransforms(), SerializationFormat.TORCH_SAVE
            results.append(_write_item(transforms, stream, data, item, name, kind))
        return results


class ThreadAsyncCaller(AsyncCaller):
    """Runs megatron-core's asynchronous requests in a thread of this process."""

    def __init__(self, work: RankSync = DEFAULT_RANK_SYNC) -> None:
        self._work = work
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Start writing. What is to be written must be a copy already."""
        self._thread = threading.Thread(target=async_req.async_fn, name="checkpoint", daemon=True)
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool, no_dist: bool) -> bool:
        """Whether every rank has written; a collective unless ``no_dist``."""
        if blocking:
            self.close()
            if not no_dist:
                self._work.barrier()
            return True
        alive = self._thread is not None and self._thread.is_alive()
        return not alive if no_dist else bool(self.sync_all_async_calls(int(alive)))

    def close(self, abort: bool = False) -> None:
        """Wait for the thread; it cannot be aborted, but ends with the process."""
        if self._thread is not None and not abort:
            self._thread.join()

    def __del__(self) -> None:
        """Nothing outlives the thread."""


def plan_write(
    sharded: Any, folder: Path, beat: Callable[[], None] = no_heartbeat
) -> tuple[ThreadedWriter, AsyncRequest]:
    """Agree with all ranks on who writes what; ``beat`` is called after each block written.

    Returns:
        This rank's writer, and a request whose function writes, and whose finalization, a
        collective, writes the index or raises torch's ``CheckpointException`` on every rank.
    """
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    writer = ThreadedWriter(folder, beat)
    state, *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(flat, False),
        writer,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    return writer, AsyncRequest(writer.write, (), [lambda: save_state_dict_async_finalize(*state)])


class _ChecksumStream(io.RawIOBase):
    """Sums what is written on its way to a file."""

    def __init__(self, stream: io.FileIO, beat: Callable[[], None]) -> None:
        self.error: OSError | None = None
        """Why a write failed."""
        self._stream, self._beat = stream, beat
        self._crc = self._size = self._synced = 0

    @property
    def entry(self) -> FileEntry:
        """Size and checksum of everything written."""
        return FileEntry(bytes=self._size, crc32=f"{self._crc:08x}")

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            # In blocks, so that the second look at each finds it in the processor's cache.
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
        """Force what was written to disk."""
        os.fsync(self._stream.fileno())
        self._synced = self._size


@contextmanager
def _without_archive_checksums() -> Iterator[None]:
    """Have torch.save leave out its own checksums, which torch.load does not look at either."""
    were_on = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(were_on)


@contextmanager
def _checksum_stream(path: Path, beat: Callable[[], None]) -> Iterator[_ChecksumStream]:
    with path.open("wb", buffering=0) as stream:
        summed = _ChecksumStream(stream, beat)
        yield summed
        summed.sync()
        beat()


def _require_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and Inf, with one look at each number and no copy.

    Raises:
        NotFiniteError: there is one.
    """
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFiniteError(f"{name} holds NaN or Inf")


def _compact_on_host(tensor: Tensor) -> Tensor:
    """A tensor on the CPU whose storage is no larger: torch.save writes whole storages."""
    tensor = tensor.detach().cpu()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor
