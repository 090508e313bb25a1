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

from megatron_llmjp.convert.copying.contiguous_runs import ContiguousRuns
from megatron_llmjp.convert.files.checksums import combine_crc32
from megatron_llmjp.convert.files.direct_io import PAGE, Bytes, advise, aligned_memory
from megatron_llmjp.convert.files.storage import (
    Extents,
    FileTensor,
    OpenFiles,
    StoredTensor,
    as_bytes,
    read_at,
)
from megatron_llmjp.convert.plan import Slot, TensorCopy, cast_elements

BLOCK_BYTES = 4 << 20
"""Bytes of a block, of the larger of the two types."""


class BlockBuffers(threading.local):
    """Memory of each thread for one block, and for a part of it."""

    def __init__(self) -> None:
        self._block, self._part = (aligned_memory(BLOCK_BYTES + PAGE) for _ in range(2))

    def block(self, nbytes: int, place: int) -> Bytes:
        """Return memory for a block whose pages are those of a file from byte ``place`` on."""
        return self._block[place % PAGE :][:nbytes]

    def part(self, nbytes: int, place: int = 0) -> Bytes:
        """Return memory for a part of a block; see :meth:`block`."""
        return self._part[place % PAGE :][:nbytes]


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
            tensor = self.stored.read().to(self.stored.dtype.torch).contiguous()
            return np.asarray(as_bytes(tensor))
        return sorted(found, key=lambda extent: extent[0])


@dataclass(frozen=True)
class BlockTarget:
    """A part that is written to each of its slots."""

    slots: list[Slot]
    runs: ContiguousRuns


@dataclass
class WrittenRange:
    """A range of a slot that was written; ``crc`` is None if the slot needs no CRC-32."""

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
            writer = self.files.writer(self.folder / file)
            writer.start_writeback(offset + found.start, found.nbytes)

    def copy_block(self, begin: int, end: int) -> None:
        """Copy the elements ``begin`` to ``end`` of the canonical tensor in the target.

        Raises:
            UserError: a source file is damaged, replicas differ, a value is out of range of the
                target's type, or the disk is full.
        """
        place = self._first_written_byte(begin, end)
        block = self.buffers.block((end - begin) * self._dtype.itemsize, place)
        crcs = self._read(block, begin, min(end, self._stored))
        if end > self._stored:
            self._repeat_last_row(block, begin)
        if self._to != self._dtype:
            block, crcs = self._cast(block), {}
        for target in self.targets:
            self._write(target, block, begin, end, crcs)

    def _first_written_byte(self, begin: int, end: int) -> int:
        """Return where in its file a block starts that a target stores as it is; 0 if none does."""
        for target in self.targets if self._to == self._dtype else []:
            first, last = target.runs.range_of(begin, end)
            if first < last:
                start, _, count = next(target.runs.pieces(first, last))
                if count == last - first:
                    return target.slots[0].offset + (first - start + begin) * self._dtype.itemsize
        return 0

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
            part = self.buffers.part(nbytes)
            self._read_part(location, first, part, verify)
            if direct is None:
                source.runs.scatter(block, begin, first, itemsize, part)
            elif not self._is_equal(direct, part):
                raise self.copy.read.replica_error(self.copy.name, source.stored)
        return crcs

    def _is_equal(self, one: Bytes, other: Bytes) -> bool:
        """Compare elements; zeros of both signs are equal."""
        if np.array_equal(one, other):
            return True
        import torch

        return torch.equal(*(torch.from_numpy(d).view(self._dtype.torch) for d in (one, other)))

    def _cast(self, block: Bytes) -> Bytes:
        """Return a block in the type of the target."""
        import torch

        elements = torch.from_numpy(block).view(self._dtype.torch)
        key = self.targets[0].slots[0].key
        return np.asarray(as_bytes(cast_elements(elements, self._to, key)))

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
            part = self.buffers.part(nbytes, target.slots[0].offset + first * itemsize)
            target.runs.gather(block, begin, first, itemsize, part)
        data = memoryview(part.data)
        for slot in target.slots:
            writer = self.files.writer(self.folder / slot.file)
            writer.write(slot.offset + first * itemsize, data)
            if slot.needs_crc and crc is None:
                crc = zlib.crc32(data)
            self._record(slot, first * itemsize, nbytes, crc if slot.needs_crc else None)

    def _record(self, slot: Slot, start: int, nbytes: int, crc: int | None) -> None:
        found = self.written.get((slot.file, slot.offset))
        if found is None:
            self.written[slot.file, slot.offset] = WrittenRange(slot, start, nbytes, crc)
        else:
            found.append(nbytes, crc)
