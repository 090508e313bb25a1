"""Log files whose failed writes are kept in memory and retried, so that they never end a run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

from megatron_llmjp.filesystem import NO_SPACE_ERRORS, warn

MAX_PENDING_BYTES = 16 << 20
"""Limit of the writes kept in memory; beyond it the oldest ones are dropped."""

_NAMES = {1: "standard output", 2: "standard error"}


class RetryingFile(io.RawIOBase):
    """An append-only file. Writing, opening and closing it raise no ``OSError``.

    A full disk, a stale handle or an unwritable folder is reported once, and writes are kept in
    memory until they succeed. A deleted file is recreated. Nothing is kept for a pipe whose reader
    has exited.

    There is no lock, since a process forked while another thread holds one would deadlock:
    concurrent writes of several threads may be reordered, but none is torn or lost.
    """

    def __init__(self, file: Path | int, warns: bool = True) -> None:
        """Open ``file``, or use an open descriptor; with ``warns``, report to standard error."""
        super().__init__()
        self._path = file if isinstance(file, Path) else None
        self._descriptor = file if isinstance(file, int) else None
        self.name = str(file) if isinstance(file, Path) else _NAMES.get(file, f"descriptor {file}")
        self._pending: deque[bytes] = deque()
        self._is_torn = False
        """Whether the oldest pending write is partly in the file already."""
        self._reader_exited = False
        self.warns, self._has_warned = warns, False
        self._drain()

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            OSError: the file is not open currently.
        """
        if self._descriptor is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)
        return self._descriptor

    def write(self, data: Any) -> int:
        """Append bytes, now or later; returns their number."""
        text = bytes(data)
        if not self._reader_exited:
            self._pending.append(text)
            self._drain()
        return len(text)

    def close(self) -> None:
        """Try once more to write pending data, and close."""
        if not self.closed:
            self._drain()
            if self._path is not None:
                self._close()
        super().close()

    def _drain(self) -> None:
        """Write pending data as far as possible."""
        try:
            self._open()
            while self._pending:
                self._write_next()
            self._has_warned = False
        except OSError as error:
            self._keep(error)

    def _open(self) -> None:
        if self._path is None:
            return
        if self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 0:
            self._close()  # the file was deleted, perhaps with its folder
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._descriptor = os.open(self._path, flags, 0o666)

    def _write_next(self) -> None:
        assert self._descriptor is not None
        try:
            text = self._pending.popleft()
        except IndexError:  # another thread took it
            return
        written = 0
        try:
            written = os.write(self._descriptor, text)
        finally:
            if written < len(text):
                self._pending.appendleft(text[written:])
                self._is_torn = self._is_torn or written > 0
            else:
                self._is_torn = False

    def _keep(self, error: OSError) -> None:
        """Report an error, and limit the pending writes."""
        if error.errno == errno.EPIPE:
            self._reader_exited = True
            self._pending.clear()
        elif error.errno not in NO_SPACE_ERRORS and self._path is not None:
            self._close()  # a stale handle stays stale: open the file again next time
        size = sum(map(len, self._pending))
        while size > MAX_PENDING_BYTES and len(self._pending) > 1:
            size -= len(self._pending[self._is_torn])
            del self._pending[self._is_torn]  # a partly written line must be completed
        if self.warns and not self._has_warned:
            self._has_warned = True
            with contextlib.suppress(OSError, ValueError):  # standard error may fail too
                warn(self._describe(error))

    def _describe(self, error: OSError) -> str:
        if self._reader_exited:
            return f"{self.name}: its reader has exited ({error.strerror}); the run continues"
        if error.errno in NO_SPACE_ERRORS:
            return f"{self.name} waits for free disk space: {error.strerror}"
        return f"{self.name} cannot be written: {error.strerror}; the log is kept in memory"

    def _close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def protect_standard_streams(warns: bool = False) -> None:
    """Replace standard output and error by :class:`RetryingFile`, so that they never end a run.

    A job's log is often on the file system whose quota its checkpoints fill, and the reader of a
    pipe may exit, as ``head`` does.

    Args:
        warns: report failures of standard output to standard error.
    """
    _occupy_standard_descriptors()
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(getattr(stream, "buffer", None), RetryingFile):
            stream.buffer.warns = warns and descriptor == 1
        elif stream is not None and stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError):
                stream.flush()
            wrapped = io.TextIOWrapper(
                RetryingFile(descriptor, warns=warns and descriptor == 1),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=True,
            )
            setattr(sys, name, wrapped)


def _occupy_standard_descriptors() -> None:
    """Open closed descriptors 0 to 2 on /dev/null, so that no checkpoint file gets their numbers.

    Text that a library prints would be written into such a file.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
