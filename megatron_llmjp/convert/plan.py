"""Plan of a conversion: which bytes of the source files become which bytes of the output files.

All shapes are known in advance, so every output file is laid out before the first tensor is read.
The rest is a list of independent copies, one per canonical tensor, which threads execute in any
order: in blocks (``block_copy.py``), or with the whole tensor in memory (:meth:`TensorCopy.run`) if
the order of its elements changes.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_left
from collections.abc import Callable, Container, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llmjp.convert.files.direct_io import FileWriter, reserve, write_at
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import (
    StoredTensor,
    as_bytes,
    byte_count,
    dtype_name,
)
from megatron_llmjp.convert.tensors import Layout, Shape, part_shapes, resize_vocabulary, whole
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    import torch

CRC_BYTES = 4
"""Size of a stored CRC-32."""

Checksums = dict[tuple[str, int], int]
"""CRC-32 of the tensors that were written, by file and offset."""


@dataclass(frozen=True)
class Slot:
    """The location of a tensor in an output file."""

    file: str
    key: str
    offset: int
    shape: Shape
    dtype: DType
    checksums: tuple[int, ...] = ()
    """Offsets in the file at which the CRC-32 of the tensor is written (zip archives)."""
    is_part: bool = False
    """Whether it is a part of a larger array, whose CRC-32 is combined from those of its parts."""

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return byte_count(self.shape, self.dtype)

    @property
    def needs_crc(self) -> bool:
        """Whether the CRC-32 of the tensor is computed."""
        return bool(self.checksums) or self.is_part


@dataclass
class OutputFile:
    """Layout of an output file: its name, size, fixed bytes by offset, and slots by key."""

    name: str
    size: int
    fixed: list[tuple[int, bytes]]
    slots: dict[str, Slot]

    def create(self, folder: Path) -> None:
        """Create the file with its full size and its fixed bytes.

        Checksums of slots are left, too, and an existing file is not truncated: each byte has the
        same value whenever it is written, so that a second process on the file does no harm.
        """
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        checksums = sorted(place for slot in self.slots.values() for place in slot.checksums)
        try:
            os.ftruncate(descriptor, self.size)
            reserve(path, self.size)
            for offset, data in self.fixed:
                start, end = offset, offset + len(data)
                inside = checksums[bisect_left(checksums, start) : bisect_left(checksums, end)]
                for place in [*inside, end]:
                    write_at(descriptor, start, data[start - offset : place - offset])
                    start = place + CRC_BYTES
        finally:
            os.close(descriptor)

    def content(self) -> bytes:
        """Return the content of a file without slots."""
        content = bytearray(self.size)
        for offset, data in self.fixed:
            content[offset : offset + len(data)] = data
        return bytes(content)


@dataclass(frozen=True)
class TensorRead:
    """How to read a canonical tensor.

    ``parts`` are the stored parts of ``layout``, in order. ``replicas`` are further copies of the
    whole tensor, which must be equal to it.
    """

    shape: Shape
    dtype: DType
    parts: Sequence[StoredTensor]
    layout: Layout = whole
    replicas: Sequence[StoredTensor] = ()
    workspace: int = 0
    """Bytes of memory to compute the tensor, in addition to those of reading it."""

    def check(self, name: str) -> None:
        """Compare the stored shapes and types with those of the layout.

        Raises:
            UserError: a shape or a type differs.
        """
        expected = part_shapes(self.layout, self.shape)
        for stored, shape in zip(self.parts, expected, strict=True):
            if tuple(stored.shape) != shape:
                raise UserError(
                    f"{stored.source}: {name} has shape {tuple(stored.shape)}, "
                    f"expected {shape} from the configuration"
                )
            if stored.dtype != self.dtype:
                raise UserError(
                    f"{stored.source}: {name} has type {dtype_name(stored.dtype)}, "
                    f"its other parts have {dtype_name(self.dtype)}"
                )

    def read(self, name: str) -> torch.Tensor:
        """Read the canonical tensor into new memory.

        Raises:
            UserError: a file is damaged, or replicas differ.
        """
        import torch

        if self.layout is whole:
            tensor = self.parts[0].read()
        else:
            tensor = torch.empty(self.shape, dtype=self.dtype.torch)
            for part, stored in zip(self.layout(tensor), self.parts, strict=True):
                if part.view.is_contiguous():
                    stored.read(part.view)
                else:
                    part.view.copy_(stored.read().view(part.view.shape))
        for replica in self.replicas:
            if not torch.equal(replica.read(), tensor):
                raise self.replica_error(name, replica)
        return tensor

    def replica_error(self, name: str, replica: StoredTensor) -> UserError:
        """Return the error for a replica with other values."""
        return UserError(
            f"{replica.source}: {name} differs from its replica in {self.parts[0].source}; "
            "it must be equal on all ranks"
        )


@dataclass
class TensorWrite:
    """How to write a canonical tensor: for each part of ``layout``, the slots to write it to."""

    layout: Layout
    slots: list[list[Slot]]
    padded_vocab_size: int | None = None
    """Padded vocabulary size of the target; None for tensors without a vocabulary dimension."""

    def shape(self, stored: Shape) -> Shape:
        """Return the shape of the canonical tensor in the target."""
        rows = self.padded_vocab_size
        return stored if rows is None else (rows, *stored[1:])

    def only(self, files: Container[str]) -> TensorWrite:
        """Return the write to some of the files."""
        slots = [[slot for slot in part if slot.file in files] for part in self.slots]
        return TensorWrite(self.layout, slots, self.padded_vocab_size)


@dataclass(frozen=True)
class TensorCopy:
    """The copy of one canonical tensor."""

    name: str
    read: TensorRead
    write: TensorWrite

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(slot.nbytes for slots in self.write.slots for slot in slots)

    @property
    def memory(self) -> int:
        """Upper bound of the peak memory, in bytes."""
        return 3 * byte_count(self.read.shape, self.read.dtype) + self.read.workspace

    def run(self, folder: Path) -> Checksums:
        """Read, rearrange and write the tensor; the files must exist.

        Peak memory is the tensor, plus one stored part while reading or one written part while
        writing.

        Returns:
            CRC-32 of the slots that store one.
        """
        sums: Checksums = {}
        tensor = self.read.read(self.name)
        if self.write.padded_vocab_size is not None:
            tensor = resize_vocabulary(tensor, self.write.padded_vocab_size)
        for part, slots in zip(self.write.layout(tensor), self.write.slots, strict=True):
            for slot in slots:
                checksum = write_slot(folder, slot, part.view)
                if checksum is not None:
                    sums[slot.file, slot.offset] = checksum
        return sums


def write_slot(folder: Path, slot: Slot, view: torch.Tensor) -> int | None:
    """Cast a tensor to the type of its slot and write it there.

    Returns:
        The CRC-32 of the written bytes, if the slot stores one.

    Raises:
        UserError: a value is out of range of the type, or the disk is full.
    """
    data = as_bytes(cast_elements(view, slot.dtype, slot.key).contiguous())
    if len(data) != slot.nbytes:
        raise ValueError(f"{slot.key}: {len(data)} bytes for a slot of {slot.nbytes}")
    with closing(FileWriter(folder / slot.file)) as writer:
        writer.write(slot.offset, data)
        if not slot.needs_crc:
            return None
        checksum = zlib.crc32(data)
        for offset in slot.checksums:
            writer.write(offset, checksum.to_bytes(4, "little"))
        return checksum


def cast_elements(tensor: torch.Tensor, dtype: DType, name: str) -> torch.Tensor:
    """Cast a tensor to the type of its slot.

    Raises:
        UserError: a value is out of range of the type.
    """
    import torch

    cast = tensor.to(dtype.torch)
    if cast.dtype == torch.float16 != tensor.dtype and not torch.isfinite(cast).all():
        raise UserError(f"{name}: values out of range of fp16; use --dtype bf16 or fp32")
    return cast


@dataclass
class OutputPlan:
    """Plan of all output files.

    ``finish`` writes the small files (configurations, indices) into the folder after all tensors
    were written; it receives the CRC-32s of the tensors.
    """

    files: list[OutputFile]
    writes: dict[str, TensorWrite]
    finish: Callable[[Path, Checksums], None]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size of all planned files in bytes."""
        return sum(file.size for file in self.files)
