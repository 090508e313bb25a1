"""A conversion on paper: which bytes of which files become which bytes of which files.

All shapes are known beforehand, so every output file is laid out before the first tensor is read.
What remains is a list of independent copies, one per canonical tensor, which any number of
processes can carry out in any order.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_llmjp.convert.files.storage import (
    StoredTensor,
    as_bytes,
    byte_count,
    dtype_name,
    write_at,
)
from megatron_llmjp.convert.tensors import Layout, Shape, part_shapes, resize_vocabulary, whole
from megatron_llmjp.errors import UserError

Checksums = dict[tuple[str, int], int]
"""CRC-32 of tensors that were written, by file and offset."""


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in an output file."""

    file: str
    key: str
    offset: int
    shape: Shape
    dtype: torch.dtype
    checksums: tuple[int, ...] = ()
    """Offsets at which the CRC-32 of the bytes belongs (zip archives)."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return byte_count(self.shape, self.dtype)


@dataclass
class OutputFile:
    """A file with room for tensors: its name, size, fixed bytes and slots."""

    name: str
    size: int
    fixed: list[tuple[int, bytes]]
    slots: dict[str, Slot]

    def create(self, folder: Path) -> None:
        """Make the file at its full size, with its fixed bytes and holes for the tensors."""
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.ftruncate(descriptor, self.size)
            for offset, data in self.fixed:
                write_at(descriptor, offset, data)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class TensorRead:
    """Where a canonical tensor comes from.

    ``parts`` are the stored parts of ``layout``, in order. ``replicas`` lists further copies of
    the whole tensor, which must be equal to it.
    """

    shape: Shape
    dtype: torch.dtype
    parts: Sequence[StoredTensor]
    layout: Layout = whole
    replicas: Sequence[StoredTensor] = ()

    def check(self, name: str) -> None:
        """Compare the stored shapes with those that the layout expects, and the types.

        Raises:
            UserError: one differs.
        """
        expected = part_shapes(self.layout, self.shape)
        for stored, shape in zip(self.parts, expected, strict=True):
            if tuple(stored.shape) != shape:
                raise UserError(
                    f"{stored.source}: {name} has shape {tuple(stored.shape)}, "
                    f"the configuration expects {shape}"
                )
            if stored.dtype != self.dtype:
                raise UserError(
                    f"{stored.source}: {name} has parts of types {dtype_name(self.dtype)} and "
                    f"{dtype_name(stored.dtype)}"
                )

    def read(self, name: str) -> torch.Tensor:
        """Assemble the canonical tensor in fresh memory.

        Raises:
            UserError: a file is damaged, or copies that must be equal differ.
        """
        if self.layout is whole:
            tensor = self.parts[0].read()
        else:
            tensor = torch.empty(self.shape, dtype=self.dtype)
            for part, stored in zip(self.layout(tensor), self.parts, strict=True):
                if part.view.is_contiguous():
                    stored.read(part.view)
                else:
                    part.view.copy_(stored.read().view(part.view.shape))
        for replica in self.replicas:
            if not torch.equal(replica.read(), tensor):
                raise UserError(
                    f"{replica.source}: {name} differs from the copy in {self.parts[0].source}, "
                    "though all ranks should hold the same"
                )
        return tensor


@dataclass
class TensorWrite:
    """Where a canonical tensor goes: for each part of ``layout`` the slots that receive it."""

    layout: Layout
    slots: list[list[Slot]]
    padded_vocab_size: int | None = None
    """Rows of the vocabulary in the target; None for tensors that are kept as they are."""


@dataclass(frozen=True)
class TensorCopy:
    """One canonical tensor's way."""

    name: str
    read: TensorRead
    write: TensorWrite

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(slot.nbytes for slots in self.write.slots for slot in slots)

    @property
    def memory(self) -> int:
        """Bytes that it needs at its peak, at most."""
        return 3 * byte_count(self.read.shape, self.read.dtype)

    def run(self, folder: Path) -> Checksums:
        """Read, rearrange and write the tensor; the files exist already.

        Peak memory is the tensor, one stored part of it while reading and one written part of it
        while writing.

        Returns:
            The CRC-32 of what was written, where the file asks for it.
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
    """Write a tensor into its slot, cast and contiguous.

    Returns:
        Its CRC-32, if the slot has places for it.

    Raises:
        UserError: a value does not fit the type, or the disk is full.
    """
    cast = view.to(slot.dtype).contiguous()
    if slot.dtype == torch.float16 != view.dtype and not torch.isfinite(cast).all():
        raise UserError(f"{slot.key}: values beyond the range of fp16; choose bf16 or fp32")
    data = as_bytes(cast)
    if len(data) != slot.nbytes:
        raise ValueError(f"{slot.key}: {len(data)} bytes for a slot of {slot.nbytes}")
    descriptor = os.open(folder / slot.file, os.O_WRONLY)
    try:
        write_at(descriptor, slot.offset, data)
        if not slot.checksums:
            return None
        checksum = zlib.crc32(data)
        for offset in slot.checksums:
            write_at(descriptor, offset, checksum.to_bytes(4, "little"))
        return checksum
    finally:
        os.close(descriptor)


@dataclass
class OutputPlan:
    """Everything that a target will hold.

    ``finish`` writes the small files (configurations, indices) into the folder once all tensors
    are in place; it is given what the tensors' checksums are.
    """

    files: list[OutputFile]
    writes: dict[str, TensorWrite]
    finish: Callable[[Path, Checksums], None]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size of all planned files."""
        return sum(file.size for file in self.files)
