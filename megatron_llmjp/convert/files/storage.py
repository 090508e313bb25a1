"""Tensors stored in files: their location, and functions that read and write their bytes.

Bytes are read with ordinary reads into memory of the caller. A memory map would count every page
that was touched as resident memory, and is slower on parallel file systems.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
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
"""Types of weights, by their names in ``--dtype``."""

BLOCK = 1 << 26
"""Bytes per write call; Linux writes at most 2 GiB at once."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type in ``--dtype``, or torch's name for other types."""
    names = {known: name for name, known in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def byte_count(shape: Shape, dtype: torch.dtype) -> int:
    """Return the size of a contiguous tensor in bytes."""
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count


class StoredTensor(Protocol):
    """Interface of a tensor that is stored in a file."""

    @property
    def shape(self) -> Shape:
        """Shape of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""

    @property
    def source(self) -> str:
        """Path of the file, for messages."""

    @property
    def checksum_ranges(self) -> tuple[ChecksumRange, ...]:
        """The ranges whose CRC-32 includes the tensor's bytes."""

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read the tensor into new memory, or into a contiguous tensor of as many elements."""

    def extents(self) -> Extents | None:
        """Return where its elements are stored; None if they are not in row-major order.

        Raises:
            UserError: a file is damaged.
        """


@dataclass(frozen=True)
class FileTensor:
    """A tensor at an offset of a file, row-major unless strides are given."""

    path: Path
    offset: int
    shape: Shape
    dtype: torch.dtype
    stride: Shape | None = None
    checksum_range: ChecksumRange | None = None
    """The range with a checksum that contains the tensor, if there is one."""

    @property
    def checksum_ranges(self) -> tuple[ChecksumRange, ...]:
        """The ranges whose CRC-32 includes the tensor's bytes."""
        return () if self.checksum_range is None else (self.checksum_range,)

    @property
    def source(self) -> str:
        """Path of the file."""
        return str(self.path)

    def extents(self) -> Extents | None:
        """Return the tensor itself, unless its elements are in another order."""
        return [(0, self)] if self.stride is None else None

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read the tensor into new memory, or into a contiguous tensor of as many elements.

        Raises:
            UserError: the file ends before the end of the tensor, or cannot be read.
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


Extents = list[tuple[int, FileTensor]]
"""Consecutive pieces of a stored tensor in row-major order: first element, and location."""


def copy_into(tensor: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    """Copy a tensor into another one of as many elements, if given; return the result."""
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
        offset: bytes from the start of the file.
        dtype: type of the elements.
        shape: shape of the tensor.
        into: contiguous tensor of as many elements to read into, instead of new memory.
        checksum_range: receives the bytes that were read.

    Raises:
        UserError: the file ends before the end of the tensor, or cannot be read.
    """
    tensor = torch.empty(shape, dtype=dtype) if into is None else into
    if tensor.numel() == 0:
        return tensor
    buffer = as_bytes(tensor)
    with OpenFiles() as files:
        read_at(files.reader(path), path, offset, buffer)
    if checksum_range is not None:
        checksum_range.add(offset, buffer)
    return tensor


class OpenFiles:
    """File descriptors that are opened when they are first used, and closed together."""

    def __init__(self) -> None:
        self._descriptors: dict[tuple[Path, int], int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def reader(self, path: Path) -> int:
        """Return a descriptor to read a file.

        Raises:
            UserError: the file cannot be opened.
        """
        try:
            return self._open(path, os.O_RDONLY)
        except OSError as error:
            raise _read_error(path, error) from error

    def writer(self, path: Path) -> int:
        """Return a descriptor to write an existing file."""
        return self._open(path, os.O_WRONLY)

    def _open(self, path: Path, flags: int) -> int:
        key = (path, flags)
        if key not in self._descriptors:
            self._descriptors[key] = os.open(path, flags)
        return self._descriptors[key]


def _read_error(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read: {error.strerror}")


def read_at(descriptor: int, path: Path, offset: int, buffer: memoryview) -> None:
    """Fill a buffer with the bytes at an offset of a file.

    Raises:
        UserError: the file is too short, or cannot be read.
    """
    done = 0
    try:
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise truncation_error(path, offset + len(buffer))
            done += count
    except OSError as error:
        raise _read_error(path, error) from error


def truncation_error(path: Path, needed: int) -> UserError:
    """Return the error for a file that is shorter than its header requires."""
    size = path.stat().st_size
    return UserError(f"{path}: truncated: {size} bytes, expected at least {needed}; copy it again")


def write_at(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """Write bytes at an offset of a file.

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
            raise UserError("the disk is full; the output was not created") from error
        raise


def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
    """Call ``posix_fadvise``; file systems that do not support it are unaffected."""
    with suppress(OSError):
        os.posix_fadvise(descriptor, offset, length, advice)


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Start to write a range of a file to disk, without waiting for it.

    Otherwise Linux keeps up to a tenth of the memory until fsync is called, while the disk is idle.
    ``POSIX_FADV_DONTNEED`` starts the write and releases only pages that are on disk already
    (mm/fadvise.c); Python has no ``sync_file_range``.
    """
    advise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor without copying them."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
