"""Threads that copy all tensors of a conversion, and sync each output file when it is complete."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from megatron_llmjp.convert.copying.block_copy import Unit, plan_block_copy
from megatron_llmjp.convert.copying.block_io import BlockBuffers, WrittenRange
from megatron_llmjp.convert.copying.progress_bar import ProgressBar
from megatron_llmjp.convert.files.checksums import combine_crc32
from megatron_llmjp.convert.files.storage import OpenFiles
from megatron_llmjp.convert.plan import Checksums, OutputFile, TensorCopy
from megatron_llmjp.filesystem import fsync_path

SYNC_THREADS = 4
"""Threads that wait for the disk."""

Completed = Callable[[str, Checksums], None]
"""Called with the name of an output file that is on disk, and the CRC-32s of its tensors."""


def copy_tensors(
    copies: Sequence[TensorCopy],
    files: Sequence[OutputFile],
    folder: Path,
    workers: int,
    quiet: bool,
    completed: Completed = lambda name, sums: None,
) -> Checksums:
    """Create the output files, copy every tensor in ``workers`` threads, and sync them to disk.

    Threads suffice: reading, writing, checksums and copies of memory release the GIL. Each thread
    needs the memory of a few blocks. Tensors whose elements change their order are held in memory
    as a whole; all threads together use no more memory for them than the largest alone.

    Args:
        copies: writes to slots of the files, each slot once.
        files: files to create.
        folder: output folder.
        workers: number of threads.
        quiet: hide the progress bar.
        completed: is called for each file, from any thread.

    Returns:
        CRC-32 of the slots that need one.

    Raises:
        UserError: a source file is damaged, or the disk is full.
        OSError: a file cannot be created or synced.
    """
    for file in files:
        file.create(folder)
    units = _units(copies)
    progress = ProgressBar(sum(unit.nbytes for unit in units), quiet)
    start = partial(_start_thread, any(unit.uses_torch for unit in units), workers)
    # Copies of whole tensors compute; more threads than cores would only need more memory.
    cores = min(workers, os.cpu_count() or 1)
    with ThreadPoolExecutor(SYNC_THREADS, "sync") as sync_pool:
        output = _CompleteFiles(folder, files, copies, sync_pool, completed)
        with (
            ThreadPoolExecutor(cores, "tensor", start) as tensors,
            ThreadPoolExecutor(workers, "block", start) as blocks,
        ):
            futures = {
                (tensors if unit.is_whole_tensor else blocks).submit(unit.run, folder): unit
                for unit in units
            }
            try:
                for future in as_completed(futures):
                    output.add(future.result())
                    progress.add(futures.pop(future).nbytes)
            finally:
                for pool in (tensors, blocks):
                    pool.shutdown(wait=False, cancel_futures=True)
        output.wait()
    progress.close()
    return output.sums


def _start_thread(uses_torch: bool, workers: int) -> None:
    """Divide the cores among the threads of torch, which most conversions do not need."""
    if uses_torch:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _units(copies: Sequence[TensorCopy]) -> list[Unit]:
    """Return the copies of whole tensors, largest first, then all blocks in the given order."""
    buffers = BlockBuffers()
    blocks: list[Unit] = []
    others: list[TensorCopy] = []
    for copy in copies:
        block_copy = plan_block_copy(copy)
        if block_copy is None:
            others.append(copy)
        else:
            blocks += block_copy.units(buffers)
    memory = _MemoryLimit(max((copy.memory for copy in others), default=0))
    others.sort(key=lambda copy: -copy.nbytes)
    return [Unit(partial(memory.run, copy), copy.nbytes, True, True) for copy in others] + blocks


class _MemoryLimit:
    """Limits the memory of concurrent copies of whole tensors to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._free, self._changed = limit, threading.Condition()

    def run(self, copy: TensorCopy, folder: Path) -> list[WrittenRange]:
        """Copy a tensor when there is enough memory."""
        with self._changed:
            self._changed.wait_for(lambda: copy.memory <= self._free)
            self._free -= copy.memory
        try:
            sums = copy.run(folder)
        finally:
            with self._changed:
                self._free += copy.memory
                self._changed.notify_all()
        slots = [slot for part in copy.write.slots for slot in part]
        return [
            WrittenRange(slot, 0, slot.nbytes, sums.get((slot.file, slot.offset))) for slot in slots
        ]


class _CompleteFiles:
    """Completes slots and files: CRC-32s in zip headers, sync to disk."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[OutputFile],
        copies: Sequence[TensorCopy],
        pool: ThreadPoolExecutor,
        completed: Completed,
    ) -> None:
        self._folder, self._pool, self._completed = folder, pool, completed
        self._ranges: dict[tuple[str, int], list[WrittenRange]] = defaultdict(list)
        self._missing = {file.name: 0 for file in files}
        for slot in (slot for copy in copies for part in copy.write.slots for slot in part):
            self._missing[slot.file] += slot.nbytes
        self._syncs: list[Future[None]] = []
        self.sums: Checksums = {}
        for name in [name for name, missing in self._missing.items() if missing == 0]:
            self._complete(name)

    def add(self, written: Sequence[WrittenRange]) -> None:
        """Add what a unit wrote."""
        for found in written:
            slot = found.slot
            ranges = self._ranges[slot.file, slot.offset]
            ranges.append(found)
            if slot.needs_crc and sum(each.nbytes for each in ranges) == slot.nbytes:
                self._write_checksum(ranges)
            self._missing[slot.file] -= found.nbytes
            if self._missing[slot.file] == 0:
                self._complete(slot.file)

    def _write_checksum(self, ranges: Sequence[WrittenRange]) -> None:
        """Write the CRC-32 of a slot from those of its ranges, which are in any order."""
        slot, crc = ranges[0].slot, 0
        for found in sorted(ranges, key=lambda found: found.start):
            assert found.crc is not None
            crc = combine_crc32(crc, found.crc, found.nbytes)
        self.sums[slot.file, slot.offset] = crc
        with OpenFiles() as files:
            for offset in slot.checksums:
                writer = files.writer(self._folder / slot.file)
                writer.write(offset, crc.to_bytes(4, "little"))

    def _complete(self, name: str) -> None:
        sums = {place: crc for place, crc in self.sums.items() if place[0] == name}
        self._syncs.append(self._pool.submit(self._sync, name, sums))

    def _sync(self, name: str, sums: Checksums) -> None:
        fsync_path(self._folder / name)
        self._completed(name, sums)

    def wait(self) -> None:
        """Wait until all files are on disk.

        Raises:
            OSError: a file cannot be synced.
        """
        for sync in as_completed(self._syncs):
            sync.result()
