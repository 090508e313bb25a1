"""Files with the sources of a dataset's documents, ``PREFIX_KEY_document.sources``.

A header with a magic number; blocks of 1,024 documents; the byte offset of each block; a JSON list
of the input files; and a trailer. A block has the columns file, line, offset and length of the id,
each as fixed-width integers above a base, or as differences if those are narrower, then the ids.
Text of consecutive lines takes about two bytes per document, shuffled text about nine.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data_tools.document_sources.columns import NO_OFFSET, DocumentSources, join_sources
from megatron_llmjp.errors import UserError

SUFFIX = ".sources"
MANIFEST_ENTRY = "document_sources"
"""Entry of a dataset's manifest: size, CRC-32 and number of documents with an id."""
MAGIC = b"DOCSRC1\n"
BLOCK_DOCUMENTS = 1024
_TRAILER = struct.Struct("<QQQ8s")
"""Documents, offset of the table of blocks, bytes of the JSON list, magic number."""
_COLUMN = struct.Struct("<BBqq")
"""1 for differences, bytes per value, first value, base."""
_COLUMNS = 4


class _File(BaseModel):
    """An entry of the list of files; see ``files.py``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = ""
    size: int | None = None
    content: Any = None
    bytes: list[Annotated[int, Field(ge=0)]] = Field([0, 0], min_length=2, max_length=2)
    first_line: int | None = None
    first_offset: int | None = None
    dataset: str = ""


_FILES = TypeAdapter(list[_File])


class SourcesFileWriter:
    """Writer of a file of sources, in constant memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._crc = self._bytes = 0
        self._waiting: list[DocumentSources] = []
        self._waiting_documents = self._documents = 0
        self._starts: list[int] = []
        self.with_id = 0
        """Documents with an id."""
        self._put(MAGIC)

    def add(self, sources: DocumentSources) -> None:
        """Append the sources of documents."""
        self._waiting.append(sources)
        self._waiting_documents += len(sources)
        if self._waiting_documents >= BLOCK_DOCUMENTS:
            self._write_blocks(BLOCK_DOCUMENTS)

    def _write_blocks(self, least: int) -> None:
        joined, at = join_sources(self._waiting), 0
        while len(joined) - at >= least:
            block = joined.slice(at, min(at + BLOCK_DOCUMENTS, len(joined)))
            self._starts.append(self._bytes)
            columns = (block.file, block.line, block.offset, block.id_lengths)
            self._put(b"".join([*map(_pack, columns), block.ids]))
            self.with_id += int(np.count_nonzero(block.id_lengths))
            self._documents += len(block)
            at += len(block)
        self._waiting = [joined.slice(at, len(joined))]
        self._waiting_documents = len(joined) - at

    def finish(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the rest, flush the file to disk and return its entry in the manifest.

        Args:
            files: description of each file, with its ``name``.
        """
        if self._waiting_documents:
            self._write_blocks(1)
        table = self._bytes
        self._put(np.array([*self._starts, table], "<u8").tobytes())
        text = json.dumps(files, ensure_ascii=False).encode(errors="surrogatepass")
        self._put(text)
        self._put(_TRAILER.pack(self._documents, table, len(text), MAGIC))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "crc32": f"{self._crc:08x}", "with_id": self.with_id}

    def close(self) -> None:
        """Close an unfinished file."""
        self._file.close()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._bytes += len(data)
        self._crc = zlib.crc32(data, self._crc)


class SourcesFile:
    """Reader of a file of sources, with random access."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            UserError: it is missing or damaged.
        """
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                magic = file.read(len(MAGIC))
                file.seek(max(size - _TRAILER.size, 0))
                self.documents, table, text, last = _TRAILER.unpack(file.read(_TRAILER.size))
                blocks = -(-self.documents // BLOCK_DOCUMENTS)
                if (magic, last) != (MAGIC, MAGIC) or (
                    table + 8 * (blocks + 1) + text + _TRAILER.size != size
                ):
                    raise ValueError("not a file of document sources, or truncated")
                file.seek(table)
                self._starts = np.frombuffer(file.read(8 * (blocks + 1)), "<u8").astype(np.int64)
                self.files = _read_files(file.read(text))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(f"{path}: the file of document sources is missing") from error
        except (ValueError, struct.error, RecursionError) as error:
            raise self._damage(str(error)) from error
        if (np.diff(self._starts) < 0).any() or self._starts[-1] != table:
            raise self._damage("its table of blocks is damaged")

    def read(self, first: int, end: int) -> DocumentSources:
        """Return the sources of the documents ``[first, end)``.

        Raises:
            UserError: the file is damaged.
        """
        parts = []
        with self.path.open("rb") as file:
            for block in range(first // BLOCK_DOCUMENTS, -(-end // BLOCK_DOCUMENTS)):
                before = block * BLOCK_DOCUMENTS
                count = min(BLOCK_DOCUMENTS, self.documents - before)
                file.seek(int(self._starts[block]))
                data = file.read(int(self._starts[block + 1] - self._starts[block]))
                found = self._block(data, count)
                parts.append(found.slice(max(first - before, 0), min(end - before, count)))
        return join_sources(parts)

    def chunks(self) -> Iterator[tuple[int, DocumentSources]]:
        """Yield the number of the first document and the sources of consecutive documents."""
        step = 64 * BLOCK_DOCUMENTS
        for first in range(0, self.documents, step):
            yield first, self.read(first, min(first + step, self.documents))

    def _block(self, data: bytes, count: int) -> DocumentSources:
        columns, at = [], 0
        try:
            for _ in range(_COLUMNS):
                column, at = _unpack(data, at, count)
                columns.append(column)
        except (ValueError, struct.error) as error:
            raise self._damage(str(error)) from error
        file, line, offset, id_lengths = columns
        found = DocumentSources(file, line, offset, id_lengths, data[at:])
        if (found.id_lengths < 0).any() or int(found.id_lengths.sum()) != len(found.ids):
            raise self._damage("a block is damaged")
        if len(found) and not 0 <= found.file.min() <= found.file.max() < len(self.files):
            raise self._damage("a block names a file that is not in the list")
        if len(found) and (found.line.min() < 0 or found.offset.min() < NO_OFFSET):
            raise self._damage("a block has a negative line or offset")
        return found

    def _damage(self, problem: str) -> UserError:
        return UserError(
            f"{self.path}: {problem}. Check the dataset with inspect_dataset --verify, and copy or "
            "write it again."
        )


def _read_files(text: bytes) -> list[dict[str, Any]]:
    """Return the list of files.

    Raises:
        ValueError: it is damaged.
    """
    found: list[dict[str, Any]] = json.loads(text)
    try:
        _FILES.validate_python(found)
    except ValidationError as error:
        raise ValueError(f"its list of files is damaged ({error.errors()[0]['msg']})") from error
    if not all(("name" in file) != ("dataset" in file) for file in found):
        raise ValueError("its list of files has an entry without a name")
    return found


def _pack(values: npt.NDArray[np.int64]) -> bytes:
    """Return a column: values above their minimum, or their differences if those are narrower."""
    differences = np.diff(values)
    plain = (int(values.min()), int(values.max()))
    steps = (int(differences.min()), int(differences.max())) if len(differences) else (0, 0)
    widths = [((most - least).bit_length() + 7) // 8 for least, most in (plain, steps)]
    is_delta = widths[1] < widths[0] or not len(differences)
    base, width = (steps[0], widths[1]) if is_delta else (plain[0], widths[0])
    stored = (differences if is_delta else values) - base
    data = np.ascontiguousarray(stored.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width])
    return _COLUMN.pack(is_delta, width, int(values[0]), base) + data.tobytes()


def _unpack(data: bytes, at: int, count: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return a column of a block and the offset after it."""
    is_delta, width, first, base = _COLUMN.unpack_from(data, at)
    at += _COLUMN.size
    stored = count - 1 if is_delta else count
    if is_delta > 1 or width > 8 or at + stored * width > len(data):
        raise ValueError("a block is damaged")
    whole = np.zeros((stored, 8), np.uint8)
    whole[:, :width] = np.frombuffer(data, np.uint8, stored * width, at).reshape(stored, width)
    values = whole.reshape(-1).view("<u8").astype(np.int64) + base
    if is_delta:
        values = np.cumsum(np.concatenate(([first], values)))
    return values, at + stored * width
