"""Columns of a table as they are passed to a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pickle import PickleBuffer
from typing import Any

import numpy as np

OFFSET = np.dtype(np.int32)
"""Type of the offsets of Arrow's string arrays."""


@dataclass(frozen=True)
class TextColumn(Sequence[Any]):
    """Texts of a column, decoded when they are read.

    Arrow's two buffers are passed to the worker as they are: the main process, which reads the
    tables for all workers, neither decodes nor encodes text.

    Attributes:
        offsets: start of each text and the end of the last, as :data:`OFFSET`.
        data: UTF-8 text from the first offset to the last.
    """

    offsets: bytes
    data: bytes

    def __len__(self) -> int:
        return len(self.offsets) // OFFSET.itemsize - 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let pickle pass the text outside its stream."""
        data = PickleBuffer(self.data) if protocol >= 5 else self.data
        return TextColumn, (self.offsets, data)

    def __getitem__(self, at: Any) -> Any:
        """Return a text; as bytes, which are a bad line, if it is not UTF-8."""
        offsets = memoryview(self.offsets).cast("i")
        at = range(len(self))[at]
        start, end = offsets[at] - offsets[0], offsets[at + 1] - offsets[0]
        text = self.data[start:end]
        try:
            return text.decode()
        except UnicodeDecodeError:
            return text


def column_values(column: Any) -> Sequence[Any]:
    """Return the values of a column of an Arrow table, None for missing ones."""
    if str(column.type) == "string" and not column.null_count:
        _, offsets, data = column.buffers()
        wanted = np.frombuffer(offsets, OFFSET, len(column) + 1, column.offset * OFFSET.itemsize)
        start, end = int(wanted[0]), int(wanted[-1])
        return TextColumn(wanted.tobytes(), data[start:end].to_pybytes() if end > start else b"")
    try:
        found: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        found = []
        for scalar in column:
            try:
                found.append(scalar.as_py())
            except UnicodeDecodeError:
                found.append(bytes(scalar.as_buffer()) if hasattr(scalar, "as_buffer") else b"")
    return found
