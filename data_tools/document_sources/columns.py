"""Sources of consecutive documents in memory, as columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

NO_OFFSET = -1
"""Offset of a row of a table, which is not a byte range of its file."""


@dataclass(frozen=True)
class DocumentSources:
    """Where documents come from.

    Attributes:
        file: number of the file in a list, ``[n]``.
        line: number of the line or row in the file from 0, ``[n]``.
        offset: byte offset of the line in the decompressed text, ``[n]``; ``NO_OFFSET`` for rows.
        id_lengths: bytes of each id, ``[n]``; 0 for a document without an id.
        ids: concatenated ids in UTF-8.
    """

    file: npt.NDArray[np.int64]
    line: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    id_lengths: npt.NDArray[np.int64]
    ids: bytes

    @classmethod
    def of_lines(
        cls, lines: Sequence[int], starts: npt.NDArray[np.int64] | None, ids: Sequence[str]
    ) -> DocumentSources:
        """Return the sources of documents of a block, relative to its start.

        Args:
            lines: line or row of each document in the block.
            starts: byte offset of each line in the block; None for rows.
            ids: id of each document; may be empty if none are recorded.
        """
        line = np.array(lines, np.int64)
        encoded = [text.encode(errors="surrogatepass") for text in ids]
        return cls(
            np.zeros(len(line), np.int64),
            line,
            np.full(len(line), NO_OFFSET) if starts is None else starts[line],
            np.fromiter(map(len, encoded), np.int64, len(encoded))
            if encoded
            else np.zeros(len(line), np.int64),
            b"".join(encoded),
        )

    def __len__(self) -> int:
        return len(self.file)

    def placed(self, file: int, first_line: int, first_offset: int) -> DocumentSources:
        """Return sources relative to the start of a file from those relative to a block of it."""
        is_row = self.offset == NO_OFFSET
        return replace(
            self,
            file=np.full(len(self), file, np.int64),
            line=self.line + first_line,
            offset=np.where(is_row, NO_OFFSET, self.offset + first_offset),
        )

    def take(self, chosen: npt.NDArray[np.int64]) -> DocumentSources:
        """Return the sources of chosen documents, in the order of their numbers in ``chosen``."""
        ids = b""
        if self.ids:
            ends = np.cumsum(self.id_lengths)
            starts = ends - self.id_lengths
            pairs = zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True)
            ids = b"".join([self.ids[a:b] for a, b in pairs])
        return self._select(chosen, ids)

    def slice(self, first: int, end: int) -> DocumentSources:
        """Return the sources of the documents ``[first, end)``."""
        before = int(self.id_lengths[:first].sum())
        inside = int(self.id_lengths[first:end].sum())
        return self._select(np.s_[first:end], self.ids[before : before + inside])

    def _select(self, chosen: Any, ids: bytes) -> DocumentSources:
        file, line, offset = self.file[chosen], self.line[chosen], self.offset[chosen]
        return DocumentSources(file, line, offset, self.id_lengths[chosen], ids)

    def id_list(self) -> list[str]:
        """Return the ids as text."""
        ends = np.cumsum(self.id_lengths)
        pairs = zip((ends - self.id_lengths).tolist(), ends.tolist(), strict=True)
        return [_decode(self.ids[a:b]) for a, b in pairs]


def _decode(own: bytes) -> str:
    try:
        return own.decode(errors="surrogatepass")
    except UnicodeDecodeError:  # a damaged file
        return own.decode(errors="replace")


ReadSources = Callable[[int, int], DocumentSources]
"""Reader of the sources of the documents ``[first, end)`` of a dataset."""


def join_sources(parts: Sequence[DocumentSources]) -> DocumentSources:
    """Return the sources of several parts in order."""
    empty = np.empty(0, np.int64)
    return DocumentSources(
        np.concatenate([empty, *(part.file for part in parts)]),
        np.concatenate([empty, *(part.line for part in parts)]),
        np.concatenate([empty, *(part.offset for part in parts)]),
        np.concatenate([empty, *(part.id_lengths for part in parts)]),
        b"".join(part.ids for part in parts),
    )


def line_starts(lines: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """Return the byte offset of each line in a text from which they were split at newlines."""
    lengths = np.fromiter(map(len, lines), np.int64, len(lines)) + 1
    return np.cumsum(lengths) - lengths


def own_id(record: Mapping[str, Any], key: str) -> str:
    """Return a record's own id as text; an empty string if it has none.

    Args:
        record: a JSON object.
        key: key of a string or an integer; ``meta.id`` is the key ``id`` of the object ``meta``.
    """
    value: Any = record.get(key)
    if value is None and "." in key:
        value = record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
