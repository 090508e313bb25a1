"""Reading of input files in blocks of whole lines or rows, the unit that a worker encodes.

A plain file is not read by the main process: a block gives the byte range of its lines, which the
worker reads. Compressed files, pipes, remote files and Parquet files are read by the main process,
and the text is passed to the worker.
"""

from __future__ import annotations

import contextlib
import lzma
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from data_tools.preprocess.input.compression import HEAD_BYTES, find_opener
from data_tools.preprocess.input.cutting import row_groups_of_part
from data_tools.preprocess.input.sources import STDIN, InputSource
from data_tools.preprocess.input.stream_codecs import find_codec
from data_tools.preprocess.input.stream_parts import StreamPart
from data_tools.preprocess.input.text_column import column_values
from megatron_llmjp.errors import UserError, did_you_mean

ROWS_PER_BLOCK = 256
TABLE_BYTES = 4 << 20
"""Size in bytes above which a block of several rows is divided."""
BLOCK_BYTES = 1 << 20
PEEK_BYTES = 64 * 1024
REMOTE_PAGE_BYTES = 1 << 20
"""Bytes of a column of a remote Parquet file that are read at a time."""


@dataclass(frozen=True)
class FileRange:
    """Byte range of lines in a plain file, read by the worker."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class TableRows:
    """Rows of a table: column values per key, None for missing values."""

    columns: dict[str, Sequence[Any]]
    count: int


@dataclass(frozen=True)
class LongLine:
    """A line above the size limit, which is rejected.

    Attributes:
        length: length in bytes, including the newline.
        parts: its bytes, which must be read before the next block is requested.
    """

    length: int
    parts: Iterator[bytes]


@dataclass(frozen=True)
class Block:
    """A part of a source.

    Attributes:
        payload: the lines or rows to encode.
        end: start of the next block, in bytes of decompressed text or in rows.
        size: size in bytes of decompressed text.
        disk_bytes: bytes of the file on disk consumed so far, for the progress bar.
    """

    payload: FileRange | bytes | TableRows | LongLine
    end: int
    size: int
    disk_bytes: int


def read_parquet(
    source: InputSource,
    file: BinaryIO,
    start: int,
    keys: list[str] | None,
    optional: Sequence[str] = (),
) -> Iterator[Block]:
    """Yield blocks of rows from row ``start`` on.

    ``keys`` are the columns to read, and those of ``optional`` that exist; None reads all. A local
    file is mapped into memory; a remote one is read through ``file``.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged or lacks a column.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"{source.name}: reading Parquet requires pyarrow: pip install pyarrow"
        ) from error
    if not source.seekable:
        raise UserError(f"{source.name}: Parquet cannot be read from a pipe; give a file")
    if source.remote is not None:
        source.remote.require_ranges("Parquet files")
    try:
        with (
            pq.ParquetFile(source.name, memory_map=True)
            if source.remote is None
            else pq.ParquetFile(file, buffer_size=REMOTE_PAGE_BYTES)
        ) as table:
            names = table.schema_arrow.names
            keys = names if keys is None else keys
            _check_columns(source, names, keys)
            for key in optional:
                column = key if key in names else key.partition(".")[0]  # a key within a struct
                if column in names and column not in keys:
                    keys = [*keys, column]
            yield from _row_blocks(source, table, start, keys, pyarrow.default_memory_pool())
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{source.name}: not a readable Parquet file ({error})") from error


def _check_columns(source: InputSource, names: list[str], keys: list[str]) -> None:
    for key in keys:
        if key not in names:
            raise UserError(
                f"{source.name}: no column '{key}'{did_you_mean(key, names)} The columns are "
                f"{', '.join(names)}; choose with --json-keys."
            )


def _row_blocks(
    source: InputSource, table: Any, start: int, keys: list[str], memory: Any
) -> Iterator[Block]:
    row, total = 0, table.metadata.num_rows
    wanted = row_groups_of_part(source, table.metadata)
    for group in range(wanted.stop):
        rows_of_group = table.metadata.row_group(group).num_rows
        if group < wanted.start or row + rows_of_group <= start:
            row += rows_of_group
            continue
        batches = table.iter_batches(
            batch_size=ROWS_PER_BLOCK, row_groups=[group], columns=keys, use_threads=False
        )
        for batch in batches:
            skipped = min(max(0, start - row), batch.num_rows)
            row += skipped
            for part in _divide(batch.slice(skipped)):
                columns = {key: column_values(part.column(key)) for key in keys}
                row += part.num_rows
                disk = min(max(source.size * row // total - source.start, 0), source.length)
                yield Block(TableRows(columns, part.num_rows), row, part.nbytes, disk)
            is_large = batch.nbytes > TABLE_BYTES
            batch = part = None  # freed before the next is decoded: it may be larger than the file
            if is_large:
                memory.release_unused()  # else it keeps the space and takes more


def _divide(batch: Any) -> Iterator[Any]:
    """Divide a batch of rows into parts of at most TABLE_BYTES or one row; omit empty ones."""
    if batch.num_rows > 1 and batch.nbytes > TABLE_BYTES:
        half = batch.num_rows // 2
        yield from _divide(batch.slice(0, half))
        yield from _divide(batch.slice(half))
    elif batch.num_rows:
        yield batch


def read_blocks(
    source: InputSource,
    start: int,
    keys: list[str] | None,
    limit: int,
    optional: Sequence[str] = (),
) -> Iterator[Block]:
    """Yield the blocks of a source.

    Args:
        source: the file.
        start: 0, or the ``end`` of an earlier block.
        keys: the columns to read, for tables; None reads all.
        limit: maximum length of a line in bytes; longer lines are yielded as LongLine.
        optional: more columns to read if they exist, for tables.

    Raises:
        UserError: the file is truncated, damaged or not supported.
    """
    with contextlib.ExitStack() as stack:
        file: BinaryIO = sys.stdin.buffer
        if source.name != STDIN:
            file = stack.enter_context(source.open())
        yield from _read_blocks(source, file, start, keys, limit, optional)
        if source.remote is not None:
            source.remote.refuse_changed()


def _read_blocks(
    source: InputSource,
    file: BinaryIO,
    start: int,
    keys: list[str] | None,
    limit: int,
    optional: Sequence[str],
) -> Iterator[Block]:
    try:
        if source.remote is not None and source.start:
            head = source.read_head(HEAD_BYTES)  # instead of a whole range that is not needed
        else:
            head = file.peek(HEAD_BYTES)[:HEAD_BYTES] if hasattr(file, "peek") else b""
        if head.startswith(b"PAR1"):
            yield from read_parquet(source, file, start, keys, optional)
            return
        opener = find_opener(source, head)
        if opener is None and source.remote is not None:
            yield from _remote_blocks(source, file, start, limit)
            return
        if opener is None and source.seekable:
            yield from _plain_blocks(source, file, start, limit)
            return
        codec = find_codec(head, source.name) if source.end is not None else None
        if codec is not None:
            part = StreamPart(source, file, codec)
            yield from _stream_blocks(part, part, _skip_bytes(part, start), limit)
            return
        stream = file if opener is None else opener(file)
        yield from _stream_blocks(stream, file, _skip_bytes(stream, start), limit)
    except (EOFError, OSError, MemoryError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the file system, not of the decompressor
        raise UserError(
            f"{source.name}: the compressed file is truncated or damaged ({error}). Copy it "
            "again and run the same command; finished files are not repeated."
        ) from error


def _plain_blocks(source: InputSource, file: BinaryIO, start: int, limit: int) -> Iterator[Block]:
    """Yield byte ranges of about BLOCK_BYTES that end at line ends, reading only around those.

    A part of a file includes all lines that begin in it.
    """
    stop = source.size if source.end is None else _line_end(file, source.end, source.size)
    begin = _line_end(file, source.start, source.size) if source.start else 0
    start = max(start, begin)
    while start < stop:
        nominal = min(start + BLOCK_BYTES, stop)
        end = _line_end(file, nominal, source.size)
        length, newline = end - start, 0
        if length > limit:  # may contain a long line: yield the lines before it, or it alone
            file.seek(start)
            newline = file.read(nominal - start).rfind(b"\n") + 1
            length = newline or length
        payload: FileRange | LongLine = FileRange(source.name, start, length)
        if length > limit and not newline:
            payload = LongLine(length, _read_in_parts(file, start, length))
        start += length
        yield Block(payload, start, length, start - source.start)


def _remote_blocks(source: InputSource, file: BinaryIO, start: int, limit: int) -> Iterator[Block]:
    """Yield the lines of a remote plain file or of a part of it, read in order."""
    begin = _line_end(file, source.start, source.size) if source.start else 0
    position = max(start, begin)
    lines = _LinesOfPart(source, file, position)
    for block in _stream_blocks(lines, file, position, limit):
        yield replace(block, disk_bytes=block.end - source.start)


class _LinesOfPart:
    """Reader of the lines that begin in a part of a file, from a line on."""

    def __init__(self, source: InputSource, file: BinaryIO, position: int) -> None:
        self._file, self._position, self._size = file, position, source.size
        self._end = self._stop = source.size if source.end is None else source.end
        if position < self._end:
            self._stop = -1  # unknown until the end of the part is read
        file.seek(position)

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, b"" at the end."""
        if self._position >= self._end and self._stop < 0:
            self._stop = _line_end(self._file, self._end, self._size)
            self._file.seek(self._position)
        stop = self._end if self._stop < 0 else self._stop
        data = self._file.read(max(min(size, stop - self._position), 0))
        self._position += len(data)
        return data


def _line_end(file: BinaryIO, offset: int, size: int) -> int:
    """Return the offset after the first newline at or after ``offset - 1``."""
    file.seek(offset - 1)
    at = offset - 1
    while data := file.read(PEEK_BYTES):
        newline = data.find(b"\n")
        if newline >= 0:
            return at + newline + 1
        at += len(data)
    return size


def _read_in_parts(file: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    file.seek(offset)
    while length and (data := file.read(min(length, BLOCK_BYTES))):
        length -= len(data)
        yield data


def _stream_blocks(stream: Any, raw: Any, position: int, limit: int) -> Iterator[Block]:
    """Split a stream into blocks; a line above the limit is copied to a temporary file."""
    pending = b""
    while data := stream.read(BLOCK_BYTES):
        newline = data.rfind(b"\n") + 1
        if newline:
            text = pending + memoryview(data)[:newline]  # one copy
            pending = data[newline:]
            position += len(text)
            yield Block(text, position, len(text), _position_on_disk(raw))
        else:
            pending += data
        if len(pending) > limit:
            with tempfile.TemporaryFile() as spool:
                length, pending = _spool_long_line(spool, pending, stream)
                position += length
                line = LongLine(length, _read_in_parts(spool, 0, length))
                yield Block(line, position, length, _position_on_disk(raw))
    if pending:
        yield Block(pending, position + len(pending), len(pending), _position_on_disk(raw))


def _spool_long_line(spool: BinaryIO, pending: bytes, stream: Any) -> tuple[int, bytes]:
    """Copy the rest of a line to ``spool``; return its length and the bytes read after it."""
    length, rest = spool.write(pending), b""
    while data := stream.read(BLOCK_BYTES):
        newline = data.find(b"\n") + 1
        length += spool.write(data[:newline] if newline else data)
        if newline:
            rest = data[newline:]
            break
    return length, rest


def _skip_bytes(stream: Any, start: int) -> int:
    left = start
    while left > 0 and (data := stream.read(min(left, BLOCK_BYTES))):
        left -= len(data)
    return start - left


def _position_on_disk(raw: Any) -> int:
    try:
        return int(raw.tell())
    except OSError:  # a pipe
        return 0
