"""What is handed to a worker: a piece of an input file, or where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FileRange:
    """Lines of a plain file, to be read by the worker."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class Rows:
    """Columns of a table: values per key, None where a row has none."""

    columns: dict[str, list[Any]]
    count: int


@dataclass(frozen=True)
class LongLine:
    """A line above the size limit: it is named and counted, and copied if it is quarantined.

    Attributes:
        length: in bytes, with its newline.
        parts: its bytes, to be read before the next block is asked for.
    """

    length: int
    parts: Iterator[bytes]


@dataclass(frozen=True)
class Block:
    """A piece of a source.

    Attributes:
        payload: what to encode.
        end: where the next block starts, in bytes of the decompressed text or in rows.
        size: decompressed bytes.
        disk_bytes: bytes of the file on disk used up so far, for the progress bar.
    """

    payload: FileRange | bytes | Rows | LongLine
    end: int
    size: int
    disk_bytes: int
