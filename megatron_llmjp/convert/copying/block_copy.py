"""Division of a tensor's copy into blocks that fit the processor's cache.

A block is a range of the canonical tensor: it is read, rearranged and written before the next one
(``block_io.py``). Tensors of any size need a few megabytes of memory, without the page faults of
new memory, which cost as much as a copy. Consecutive blocks form units, which threads execute in
any order. Blocks start at multiples of their size, also if only some output files are written.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_llmjp.convert.copying.block_io import (
    BLOCK_BYTES,
    BlockBuffers,
    BlockIO,
    BlockSource,
    BlockTarget,
    Location,
    WrittenRange,
)
from megatron_llmjp.convert.copying.contiguous_runs import find_runs
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import FileTensor, OpenFiles
from megatron_llmjp.convert.plan import TensorCopy, TensorRead, TensorWrite
from megatron_llmjp.convert.strided_view import Shape, StridedView
from megatron_llmjp.convert.tensors import Layout, whole

UNIT_BLOCKS = 16
"""Blocks of a unit: a thread reads and writes up to 64 MB in sequence."""


@dataclass(frozen=True)
class Unit:
    """A part of the copy of a tensor, with its size in bytes, for one thread.

    ``run`` writes it into a folder that contains the output files, and returns what was written.
    """

    run: Callable[[Path], list[WrittenRange]]
    nbytes: int
    uses_torch: bool
    is_whole_tensor: bool = False


class BlockCopy:
    """The copy of a tensor in blocks."""

    def __init__(
        self, copy: TensorCopy, sources: list[BlockSource], targets: list[BlockTarget]
    ) -> None:
        self._copy, self._sources, self._targets = copy, sources, targets
        self._dtype = targets[0].slots[0].dtype
        self._step = BLOCK_BYTES // max(copy.read.dtype.itemsize, self._dtype.itemsize)
        self._lock = threading.Lock()
        self._locations: list[Location] | None = None
        self._unfinished = 0

    def units(self, buffers: BlockBuffers) -> list[Unit]:
        """Return the units that write to a slot."""
        size = math.prod(self._copy.write.shape(self._copy.read.shape))
        length = UNIT_BLOCKS * self._step
        found = []
        for begin in range(0, size, length):
            ends = [*range(begin, min(begin + length, size), self._step), min(begin + length, size)]
            sizes = {block: self._nbytes(*block) for block in pairwise(ends)}
            blocks = [block for block, nbytes in sizes.items() if nbytes]
            if blocks:
                run = partial(self._run, blocks, buffers)
                found.append(Unit(run, sum(sizes.values()), self._dtype != self._copy.read.dtype))
        self._unfinished = len(found)
        return found

    def _nbytes(self, begin: int, end: int) -> int:
        """Return the bytes that the slots store of a range of the canonical tensor."""
        count = 0
        for target in self._targets:
            first, last = target.runs.range_of(begin, end)
            count += (last - first) * len(target.slots)
        return count * self._dtype.itemsize

    def _run(
        self, blocks: list[tuple[int, int]], buffers: BlockBuffers, folder: Path
    ) -> list[WrittenRange]:
        """Copy some blocks; the last unit also verifies checksums that only this copy knows."""
        sources = list(zip(self._sources, self._locate(), strict=True))
        with OpenFiles() as files:
            io = BlockIO(self._copy, sources, self._targets, files, folder, buffers)
            io.prefetch(blocks[0][0], blocks[-1][1])
            for begin, end in blocks:
                io.copy_block(begin, end)
            io.start_writeback()
        with self._lock:
            self._unfinished -= 1
            is_last = self._unfinished == 0
        if is_last:
            self._finish_checksums(sources)
        return list(io.written.values())

    def _locate(self) -> list[Location]:
        with self._lock:
            if self._locations is None:
                self._locations = [source.locate() for source in self._sources]
            return self._locations

    def _finish_checksums(self, sources: list[tuple[BlockSource, Location]]) -> None:
        """Verify the checksums of archives that were opened for this copy only."""
        for source, location in sources:
            for _, piece in [] if isinstance(location, np.ndarray) else location:
                for found in piece.checksum_ranges:
                    if found not in source.stored.checksum_ranges:
                        found.finish()


def plan_block_copy(copy: TensorCopy) -> BlockCopy | None:
    """Divide a copy into blocks; return None if it needs the whole tensor in memory."""
    slots = [slot for part in copy.write.slots for slot in part]
    if len({slot.dtype for slot in slots}) != 1 or copy.read.workspace:
        return None
    sources, targets = _sources(copy.read), _targets(copy.write, copy.read.shape)
    return BlockCopy(copy, sources, targets) if sources and targets else None


def _sources(read: TensorRead) -> list[BlockSource] | None:
    """Return the parts, then the replicas; None if the order of the elements changes."""
    views = _views(read.layout, read.shape) + _views(whole, read.shape) * len(read.replicas)
    found: list[BlockSource] = []
    for view, stored in zip(views, [*read.parts, *read.replicas], strict=True):
        runs = find_runs(view, read.dtype.itemsize)
        is_strided = isinstance(stored, FileTensor) and stored.stride is not None
        if runs is None or stored.dtype != read.dtype or is_strided:
            return None
        found.append(BlockSource(stored, runs, len(found) >= len(read.parts)))
    return found


def _targets(write: TensorWrite, stored: Shape) -> list[BlockTarget] | None:
    """Return the parts that have slots; None if the order of the elements changes."""
    found = []
    dtype = next((slot.dtype for part in write.slots for slot in part), DType.uint8)
    views = _views(write.layout, write.shape(stored))
    for view, slots in zip(views, write.slots, strict=True):
        runs = find_runs(view, dtype.itemsize)
        if runs is None:
            return None
        for slot in slots:
            if slot.nbytes != view.numel() * dtype.itemsize:
                raise ValueError(f"{slot.key}: {view.numel()} elements for a slot of {slot.shape}")
        if slots:
            found.append(BlockTarget(slots, runs))
    return found


def _views(layout: Layout, shape: Shape) -> list[StridedView]:
    return [part.view for part in layout(StridedView.of(shape))]
