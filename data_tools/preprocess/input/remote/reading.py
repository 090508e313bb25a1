"""Readers of remote files: in parallel ranges with prefetch, or sequentially from the beginning.

A broken connection continues at the byte after the last one received.
"""

from __future__ import annotations

import io
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from data_tools.preprocess.input.remote.failures import Attempts, status_of
from data_tools.preprocess.input.remote.files import ByteStream, RemoteFile
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import warn

CHUNK_BYTES = 8 << 20
"""Size of the ranges that are requested."""
PARALLEL = 4
"""Ranges requested at the same time when a file is read in order."""
PARALLEL_HEADS = 16
MAX_CHUNKS = 8
"""Ranges kept in memory; the columns of a Parquet file are read at several places in turn."""
MIN_REQUEST_BYTES = 64 << 10
"""Requests are halved down to this size while a connection breaks before any data arrives."""
BUFFER_BYTES = 128 << 10
SECONDS_BETWEEN_WARNINGS = 60.0


def open_remote(file: RemoteFile, start: int = 0, end: int | None = None) -> BinaryIO:
    """Open a file for reading; it is seekable, but only with ranges at no cost.

    Errors of the reader are UserErrors.

    Args:
        file: the file.
        start, end: the part that will be read; ranges are requested in advance up to its end, and
            begin at its start.
    """
    raw = RangeReader(file, start, end) if file.has_ranges else SequentialReader(file)
    return io.BufferedReader(raw, BUFFER_BYTES)


def read_head(file: RemoteFile, count: int) -> bytes:
    """Return the first bytes of a file; they are read once."""
    end = min(count, file.size)
    known = file.store.heads.get(file.path, b"")
    if len(known) >= end:
        return known[:end]
    if file.has_ranges:
        data = RangeFetcher(file).fetch(0, end)
    else:
        with open_remote(file) as opened:
            data = opened.read(end)
    file.store.heads[file.path] = data
    return data


def read_heads(files: Sequence[RemoteFile], count: int) -> None:
    """Read the first bytes of files at the same time, for :func:`read_head`."""
    with ThreadPoolExecutor(PARALLEL_HEADS, "remote") as threads:
        list(threads.map(lambda file: read_head(file, count), files))


class RangeFetcher:
    """Requests of byte ranges of one file, by several threads."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._request = CHUNK_BYTES  # reduced while connections break before any data arrives
        self.closing = threading.Event()
        """Ends the waiting between attempts."""
        self._warned = -SECONDS_BETWEEN_WARNINGS

    def fetch(self, start: int, end: int) -> bytes:
        """Return the bytes ``[start, end)``, in several requests if connections break.

        Raises:
            UserError: the file changed or is not accessible, or connections break for too long.
        """
        hint = self._file.store.access_hint
        attempts = Attempts(self._file.name, hint, self.closing, self._warn)
        parts: list[bytes] = []
        while start < end:
            before = start
            try:
                for data in self._receive(start, min(end, start + self._request)):
                    parts.append(data)
                    start += len(data)
                    attempts.progress()
                self._request = min(2 * self._request, CHUNK_BYTES)
            except UserError:
                raise
            except Exception as error:  # of any of the libraries
                if start == before and status_of(error) is None:
                    self._request = max(self._request // 2, MIN_REQUEST_BYTES)
                attempts.wait(error, f"at byte {start:,}")
        return b"".join(parts)

    def _warn(self, text: str) -> None:
        """Print a warning, unless another thread has just done so."""
        now = time.monotonic()
        if now - self._warned >= SECONDS_BETWEEN_WARNINGS:
            self._warned = now
            warn(text)

    def _receive(self, start: int, end: int) -> Iterator[bytes]:
        stream = self._file.store.stream(self._file, start, end, self.closing)
        try:
            while start < end:
                data = _read_some(stream, end - start)
                start += len(data)
                yield data
        finally:
            stream.close()


def _read_some(stream: ByteStream, size: int) -> bytes:
    """Return at least one byte.

    Raises:
        ConnectionError: the response has ended.
    """
    data = stream.read(size)
    if not data:
        raise ConnectionError("the connection was closed before the end of the data")
    return data


class _Reader(io.RawIOBase):
    """Position in a remote file."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; nothing is read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(start + offset, 0)
        return self._position


class RangeReader(_Reader):
    """Reader in ranges of CHUNK_BYTES, with prefetch while a file is read in order."""

    def __init__(self, file: RemoteFile, start: int, end: int | None) -> None:
        super().__init__(file)
        # Chunk n begins at this offset + n * CHUNK_BYTES. The byte before the start is read too.
        self._offset = max(start - 1, 0) % CHUNK_BYTES - CHUNK_BYTES
        self._last = self._number(min(file.size if end is None else end, file.size) - 1)
        """The last chunk that is requested in advance."""
        self._chunks: OrderedDict[int, Future[bytes]] = OrderedDict()
        """Ranges in memory or under way, the one used last at the end."""
        self._threads: ThreadPoolExecutor | None = None
        self._fetcher = RangeFetcher(file)

    def readinto(self, buffer: Any, /) -> int:
        """Read at most up to the end of a range."""
        if self._position >= self._file.size:
            return 0
        number = self._number(self._position)
        target = memoryview(buffer).cast("B")
        offset = self._position - self._bounds(number)[0]
        part = memoryview(self._chunk(number))[offset : offset + len(target)]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        """Cancel requests, without waiting for those under way."""
        self._fetcher.closing.set()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._chunks.clear()
        super().close()

    def _number(self, position: int) -> int:
        """Return the number of the chunk that contains a byte."""
        return (position - self._offset) // CHUNK_BYTES

    def _bounds(self, number: int) -> tuple[int, int]:
        """Return the byte range of a chunk."""
        start = self._offset + number * CHUNK_BYTES
        return max(start, 0), min(start + CHUNK_BYTES, self._file.size)

    def _chunk(self, number: int) -> bytes:
        in_order = number - 1 in self._chunks
        found = self._request(number)
        if in_order:
            for ahead in range(number + 1, min(number + PARALLEL, self._last + 1)):
                self._request(ahead)
        self._chunks.move_to_end(number)
        while len(self._chunks) > MAX_CHUNKS:
            self._chunks.popitem(last=False)[1].cancel()
        return found.result()

    def _request(self, number: int) -> Future[bytes]:
        if number not in self._chunks:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(PARALLEL, "remote")
            self._chunks[number] = self._threads.submit(self._fetcher.fetch, *self._bounds(number))
        return self._chunks[number]


class SequentialReader(_Reader):
    """Reader of a file on a server without ranges, over one connection.

    After a broken connection, or to read earlier data, the file is requested again, and everything
    before the position is skipped.
    """

    def __init__(self, file: RemoteFile) -> None:
        super().__init__(file)
        self._stream: ByteStream | None = None
        self._closing = threading.Event()  # never set: the main thread waits itself
        self._at = 0  # position in the stream
        self._furthest = 0
        self._attempts = Attempts(file.name, file.store.access_hint)

    def readinto(self, buffer: Any, /) -> int:
        """Read what has arrived, at least one byte before the end of the file."""
        target = memoryview(buffer).cast("B")
        size = min(len(target), self._file.size - self._position)
        while size > 0:
            try:
                data = self._read(size)
                break
            except UserError:
                raise
            except Exception as error:  # of any of the libraries
                self._drop()
                self._attempts.wait(error, f"at byte {self._at:,}")
        else:
            return 0
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        if self._stream is None or self._at > self._position:
            self._drop()
            self._stream = self._file.store.stream(self._file, 0, self._file.size, self._closing)
            self._at = 0
        while self._at < self._position:
            self._receive(self._stream, min(self._position - self._at, CHUNK_BYTES))
        return self._receive(self._stream, size)

    def _receive(self, stream: ByteStream, size: int) -> bytes:
        data = _read_some(stream, size)
        self._at += len(data)
        if self._at > self._furthest:
            self._furthest = self._at
            self._attempts.progress()
        return data

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
