"""Tensors at rest: where the bytes of a tensor lie, and how they are read and written.

Bytes are read with ordinary reads into memory of exactly the tensor's size. A memory map would
count every page ever touched as resident memory, and is slower on parallel file systems.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.tensors import Shape
from megatron_llmjp.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Types of weights, by the name that ``--dtype`` takes."""

BLOCK = 1 << 26
"""Bytes written per call: Linux moves at most 2 GiB at once, and progress is shown in between."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type as ``--dtype`` takes it, or torch's own."""
    names = {known: name for name, known in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def byte_count(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor."""
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count


class StoredTensor(Protocol):
    """A tensor in a file. Picklable: worker processes read it."""

    @property
    def shape(self) -> Shape:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""

    @property
    def source(self) -> str:
        """The file, for messages and plans."""

    @property
    def checksum_ranges(self) -> tuple[ChecksumRange, ...]:
        """The checksums that reading it takes part in."""

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read it, into fresh memory or a contiguous tensor of as many elements."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor whose elements lie at an offset of a file, row-major unless strides are given."""

    path: Path
    offset: int
    shape: Shape
    dtype: torch.dtype
    stride: Shape | None = None
    checksum_range: ChecksumRange | None = None
    """What has a checksum, if its bytes are part of such a thing."""

    @property
    def checksum_ranges(self) -> tuple[ChecksumRange, ...]:
        """The checksums that reading it takes part in."""
        return () if self.checksum_range is None else (self.checksum_range,)

    @property
    def source(self) -> str:
        """The file."""
        return str(self.path)

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read it, into fresh memory or a contiguous tensor of as many elements.

        Raises:
            UserError: the file ends before the tensor does, or cannot be read.
        """
        if self.stride is None:
            return read_elements(
                self.path, self.offset, self.dtype, self.shape, into, self.checksum_range
            )
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        size = (last + 1,)
        elements = read_elements(
            self.path, self.offset, self.dtype, size, None, self.checksum_range
        )
        return copy_into(elements.as_strided(self.shape, self.stride).contiguous(), into)


def copy_into(tensor: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    """The tensor itself, or the one it was to be read into."""
    return tensor if into is None else into.copy_(tensor.view(into.shape))


def read_elements(
    path: Path,
    offset: int,
    dtype: torch.dtype,
    shape: Shape,
    into: torch.Tensor | None = None,
    checksum_range: ChecksumRange | None = None,
) -> torch.Tensor:
    """Read a contiguous tensor that starts at byte ``offset``.

    Args:
        path: the file.
        offset: in bytes.
        dtype: of the elements.
        shape: of the tensor.
        into: contiguous memory for as many elements, instead of fresh one.
        checksum_range: is given what was read.

    Raises:
        UserError: the file ends too early, or cannot be read.
    """
    tensor = torch.empty(shape, dtype=dtype) if into is None else into
    if tensor.numel() == 0:
        return tensor
    buffer = as_bytes(tensor)
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            done = 0
            while done < len(buffer):
                count = stream.readinto(buffer[done:]) or 0
                if count == 0:
                    raise truncation_error(path, offset + len(buffer))
                done += count
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if checksum_range is not None:
        checksum_range.add(offset, buffer)
    return tensor


def truncation_error(path: Path, needed: int) -> UserError:
    """The error for a file that is shorter than its own header says."""
    size = path.stat().st_size
    return UserError(f"{path}: truncated: {size} bytes, at least {needed} needed; copy it again")


def write_at(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """Write all bytes at an offset.

    Raises:
        UserError: the disk is full.
    """
    view = memoryview(data)
    done = 0
    try:
        while done < len(view):
            done += os.pwrite(descriptor, view[done : done + BLOCK], offset + done)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError("the disk is full; nothing was left behind") from error
        raise


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
