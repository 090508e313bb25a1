"""Reading, rearranging and writing blocks of a canonical tensor.

The CRC-32 of a range is computed once if the source and the output store the same bytes.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_llmjp.convert.copying.contiguous_runs import Bytes, ContiguousRuns
from megatron_llmjp.convert.files.checksums import combine_crc32
from megatron_llmjp.convert.files.storage import (
    Extents,
    FileTensor,
    OpenFiles,
    StoredTensor,
    advise,
    as_bytes,
    read_at,
    start_writeback,
    write_at,
)
from megatron_llmjp.convert.plan import Slot, TensorCopy, cast_elements

BLOCK_BYTES = 4 << 20
"""Bytes of a block, of the larger of the two types."""


class BlockBuffers(threading.local):
    """Memory of each thread for one block, and for a part of it."""

    def __init__(self) -> None:
        self.block, self.part = (np.empty(BLOCK_BYTES, np.uint8) for _ in range(2))


Location = Extents | Bytes
"""Where the elements of a source are: in files, or in memory if their order had to be changed."""


@dataclass(frozen=True)
class BlockSource:
    """A stored part and its runs; a replica of the whole tensor is compared with the parts."""

    stored: StoredTensor
    runs: ContiguousRuns
    is_replica: bool

    def locate(self) -> Location:
        """Return where the elements are.

        Raises:
            UserError: the file is damaged.
        """
        found = self.stored.extents()
        if found is None:
            tensor = self.stored.read().to(self.stored.dtype).contiguous()
            return np.asarray(as_bytes(tensor))
        return sorted(found, key=lambda extent: extent[0])


@dataclass(frozen=True)
class BlockTarget:
    """A part that is written to each of its slots."""

    slots: list[Slot]
    runs: ContiguousRuns


@dataclass
class WrittenRange:
    """A range of a slot that was written; ``crc`` is None if the slot stores no CRC-32."""

    slot: Slot
    start: int
    nbytes: int
    crc: int | None

    def append(self, nbytes: int, crc: int | None) -> None:
        """Add the bytes that follow."""
        if crc is not None and self.crc is not None:
            self.crc = combine_crc32(self.crc, crc, nbytes)
        self.nbytes += nbytes


@dataclass
class BlockIO:
    """Copies consecutive blocks of one tensor."""

    copy: TensorCopy
    sources: list[tuple[BlockSource, Location]]
    targets: list[BlockTarget]
    files: OpenFiles
    folder: Path
    buffers: BlockBuffers
    written: dict[tuple[str, int], WrittenRange] = field(default_factory=dict)
    """What was written, by file and offset of the slot."""

    def __post_init__(self) -> None:
        self._dtype, self._to = self.copy.read.dtype, self.targets[0].slots[0].dtype
        self._stored = math.prod(self.copy.read.shape)
        self._last_row: Bytes | None = None

    def prefetch(self, begin: int, end: int) -> None:
        """Start to read a range of the canonical tensor into the page cache."""
        for source, location in self.sources:
            first, last = source.runs.range_of(begin, end)
            for piece, offset, _, nbytes in self._pieces(location, first, last):
                advise(self.files.reader(piece.path), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def start_writeback(self) -> None:
        """Start to write everything to disk."""
        for (file, offset), found in self.written.items():
            descriptor = self.files.writer(self.folder / file)
            start_writeback(descriptor, offset + found.start, found.nbytes)

    def copy_block(self, begin: int, end: int) -> None:
        """Copy the elements ``begin`` to ``end`` of the canonical tensor in the target.

        Raises:
            UserError: a source file is damaged, replicas differ, a value is out of range of the
                target's type, or the disk is full.
        """
        block = self.buffers.block[: (end - begin) * self._dtype.itemsize]
        crcs = self._read(block, begin, min(end, self._stored))
        if end > self._stored:
            self._repeat_last_row(block, begin)
        if self._to != self._dtype:
            elements = torch.from_numpy(block).view(self._dtype)
            key = self.targets[0].slots[0].key
            block, crcs = np.asarray(as_bytes(cast_elements(elements, self._to, key))), {}
        for target in self.targets:
            self._write(target, block, begin, end, crcs)

    def _read(
        self, block: Bytes, begin: int, end: int, verify: bool = True
    ) -> dict[tuple[int, int], int]:
        """Read a range; return the known CRC-32s by first element and number of elements."""
        crcs = {}
        itemsize = self._dtype.itemsize
        for source, location in self.sources:
            first, last = source.runs.range_of(begin, end)
            if first == last:
                continue
            place, _, count = next(source.runs.pieces(first, last))
            nbytes, at = (last - first) * itemsize, (place - begin) * itemsize
            direct = block[at : at + nbytes] if count == last - first else None
            if direct is not None and not source.is_replica:
                crc = self._read_part(location, first, direct, verify)
                if crc is not None:
                    crcs[place, count] = crc
                continue
            part = self.buffers.part[:nbytes]
            self._read_part(location, first, part, verify)
            if direct is None:
                source.runs.scatter(block, begin, first, itemsize, part)
            elif not self._is_equal(direct, part):
                raise self.copy.read.replica_error(self.copy.name, source.stored)
        return crcs

    def _is_equal(self, one: Bytes, other: Bytes) -> bool:
        """Compare elements; zeros of both signs are equal."""
        views = [torch.from_numpy(data).view(self._dtype) for data in (one, other)]
        return np.array_equal(one, other) or torch.equal(*views)

    def _read_part(self, location: Location, first: int, into: Bytes, verify: bool) -> int | None:
        """Read a range of a stored part; return its CRC-32 if it was computed."""
        itemsize = self._dtype.itemsize
        if isinstance(location, np.ndarray):
            into[...] = location[first * itemsize :][: len(into)]
            return None
        crc, done = None, 0
        for piece, offset, start, nbytes in self._pieces(
            location, first, first + len(into) // itemsize
        ):
            data = memoryview(into[start : start + nbytes].data)
            read_at(self.files.reader(piece.path), piece.path, offset, data)
            if verify and piece.checksum_range is not None:
                crc = piece.checksum_range.add(offset, data)
            done += nbytes
        if done != len(into):
            raise ValueError(f"{self.copy.name}: {done} of {len(into)} bytes are stored")
        return crc if nbytes == len(into) else None

    def _pieces(
        self, location: Location, first: int, last: int
    ) -> Iterator[tuple[FileTensor, int, int, int]]:
        """Yield the stored tensors with a range: tensor, offset in its file, start, bytes."""
        itemsize = self._dtype.itemsize
        for begin, piece in [] if isinstance(location, np.ndarray) else location:
            low, high = max(first, begin), min(last, begin + math.prod(piece.shape))
            if low < high:
                offset = piece.offset + (low - begin) * itemsize
                yield piece, offset, (low - first) * itemsize, (high - low) * itemsize

    def _repeat_last_row(self, block: Bytes, begin: int) -> None:
        """Fill the padding rows of the vocabulary, as ``tensors.resize_vocabulary`` does."""
        row = math.prod(self.copy.read.shape[1:])
        itemsize = self._dtype.itemsize
        if self._last_row is None:
            self._last_row = np.empty(row * itemsize, np.uint8)
            self._read(self._last_row, self._stored - row, self._stored, verify=False)
        start = max(begin, self._stored)
        padding = block[(start - begin) * itemsize :]
        shift = (start - self._stored) % row * itemsize
        copies = -(-(shift + len(padding)) // len(self._last_row))
        padding[...] = np.tile(self._last_row, copies)[shift : shift + len(padding)]

    def _write(
        self, target: BlockTarget, block: Bytes, begin: int, end: int,
        crcs: dict[tuple[int, int], int],
    ) -> None:  # fmt: skip
        """Write the part of a block that belongs to a target."""
        first, last = target.runs.range_of(begin, end)
        if first == last:
            return
        itemsize = self._to.itemsize
        place, _, count = next(target.runs.pieces(first, last))
        nbytes, at = (last - first) * itemsize, (place - begin) * itemsize
        crc = None
        if count == last - first:
            part, crc = block[at : at + nbytes], crcs.get((place, count))
        else:
            part = self.buffers.part[:nbytes]
            target.runs.gather(block, begin, first, itemsize, part)
        data = memoryview(part.data)
        for slot in target.slots:
            descriptor = self.files.writer(self.folder / slot.file)
            write_at(descriptor, slot.offset + first * itemsize, data)
            if slot.checksums and crc is None:
                crc = zlib.crc32(data)
            self._record(slot, first * itemsize, nbytes, crc if slot.checksums else None)

    def _record(self, slot: Slot, start: int, nbytes: int, crc: int | None) -> None:
        found = self.written.get((slot.file, slot.offset))
        if found is None:
            self.written[slot.file, slot.offset] = WrittenRange(slot, start, nbytes, crc)
        else:
            found.append(nbytes, crc)
