"""Tensors stored in files: their location, and functions that read their bytes.

Bytes are read with ordinary reads into memory of the caller. A memory map would count every page
that was touched as resident memory, and is slower on parallel file systems.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.files.direct_io import FileWriter
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.tensors import Shape
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES: dict[str, DType] = {
    "fp32": DType.float32,
    "fp16": DType.float16,
    "bf16": DType.bfloat16,
}
"""Types of weights, by their names in ``--dtype``."""


def dtype_name(dtype: DType) -> str:
    """Return the name of a type in ``--dtype``, or torch's name for other types."""
    names = {known: name for name, known in DTYPES.items()}
    return names.get(dtype, dtype.name)


def byte_count(shape: Shape, dtype: DType) -> int:
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
    def dtype(self) -> DType:
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
    dtype: DType
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
    dtype: DType,
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
    import torch

    tensor = torch.empty(shape, dtype=dtype.torch) if into is None else into
    if tensor.numel() == 0:
        return tensor
    buffer = as_bytes(tensor)
    with OpenFiles() as files:
        read_at(files.reader(path), path, offset, buffer)
    if checksum_range is not None:
        checksum_range.add(offset, buffer)
    return tensor


class OpenFiles:
    """Files that are opened when they are first used, and closed together; for one thread."""

    def __init__(self) -> None:
        self._readers: dict[Path, int] = {}
        self._writers: dict[Path, FileWriter] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._readers.values():
            os.close(descriptor)
        for writer in self._writers.values():
            writer.close()

    def reader(self, path: Path) -> int:
        """Return a descriptor to read a file.

        Raises:
            UserError: the file cannot be opened.
        """
        try:
            if path not in self._readers:
                self._readers[path] = os.open(path, os.O_RDONLY)
            return self._readers[path]
        except OSError as error:
            raise _read_error(path, error) from error

    def writer(self, path: Path) -> FileWriter:
        """Return a writer of an existing file."""
        if path not in self._writers:
            self._writers[path] = FileWriter(path)
        return self._writers[path]


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


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor without copying them."""
    import torch

    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
