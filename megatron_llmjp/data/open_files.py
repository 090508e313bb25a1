"""Reads of many data files through a bounded number of open files, without memory maps.

Each memory map holds a file descriptor and an entry of the process's address space. A blend of 113
datasets needs about 700 of them with megatron-core's readers, and some network file systems refuse
more than a few hundred. Positioned reads need one descriptor per file that is in use, fail with an
exception instead of SIGBUS, and do not count as memory of the process.
"""

from __future__ import annotations

import math
import operator
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.errors import DataError

MAX_OPEN_FILES = 32
"""Number of files kept open by one process for reading datasets and their indices."""


class OpenFiles:
    """Files opened for reading, of which the most recently used ones stay open.

    Positioned reads do not move a file offset, so forked processes may share the descriptors. One
    object must not be used by several threads.
    """

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of open files."""
        return len(self._open)

    def read(self, path: str, offset: int, size: int) -> bytearray:
        """Return ``size`` bytes of a file from byte ``offset``.

        Raises:
            DataError: the file is shorter, or cannot be read.
        """
        done = 0
        try:
            if offset < 0:  # preadv would read from the current offset of the file
                raise ValueError("the offset is negative")
            found = bytearray(size)  # a ValueError if a damaged index gives a negative size
            view = memoryview(found)
            descriptor = self._descriptor(path)
            while done < size:
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except (OSError, OverflowError, ValueError) as error:
            raise DataError(f"{path}: cannot read {size:,} bytes at {offset:,}: {error}") from error
        if done < size:
            raise DataError(
                f"{path}: {size:,} bytes at byte {offset:,} were expected, found {done:,}. The "
                "file was truncated, or its index belongs to another file: copy both again"
            )
        return found

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, path: str) -> int:
        descriptor = self._open.get(path)
        if descriptor is None:
            while len(self._open) >= self._limit:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(path)
        return descriptor

    def __del__(self) -> None:
        self.close()


class StoredArray:
    """An array in a file, of which elements and slices of the first axis are read on demand."""

    def __init__(
        self,
        files: OpenFiles,
        path: str | Path,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        offset: int,
    ) -> None:
        """Describe an array in C order whose first element is at byte ``offset``."""
        self._files = files
        self._path = str(path)
        self.dtype = dtype
        self.shape = shape
        self._offset = offset
        self._row_shape = shape[1:]
        self._row_bytes = dtype.itemsize * math.prod(shape[1:])

    @classmethod
    def of(cls, array: np.memmap[Any, Any], files: OpenFiles) -> StoredArray:
        """Return the array of a memory map, which may then be closed."""
        assert array.filename is not None and array.flags.c_contiguous
        return cls(files, str(array.filename), array.dtype, array.shape, array.offset)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: int | slice | npt.NDArray[Any]) -> Any:
        """Return one element (a scalar or a row), a slice without a step, or several elements."""
        if isinstance(where, np.ndarray):
            return np.asarray(self)[where]
        if isinstance(where, slice):
            first, end, step = where.indices(len(self))
            assert step == 1
            return self._read(first, max(0, end - first))
        number = operator.index(where)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"{self._path}: element {where} of {len(self):,}")
        return self._read(number, 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return the whole array, memory-mapped as long as it is in use."""
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        found = np.memmap(self._path, self.dtype, "r", self._offset, self.shape)
        return np.array(found, dtype) if copy or dtype not in (None, self.dtype) else found

    def _read(self, first: int, count: int) -> npt.NDArray[Any]:
        at = self._offset + first * self._row_bytes
        read = self._files.read(self._path, at, count * self._row_bytes)
        return np.frombuffer(read, self.dtype).reshape(count, *self._row_shape)
