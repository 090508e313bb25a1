"""Writes past the page cache (``O_DIRECT``), in threads.

A write through the page cache copies the data, allocates pages and writes them back later: several
times the processor time of a direct write, which the disk reads from the program's memory. Direct
writes must start and end at pages of the file, from memory with the same alignment. The rest of a
range, less than a page at either end, is written through the page cache.

Which pages of a file are written directly depends on the ranges only. Processes that write the same
ranges therefore agree, and no cached page hides what another one wrote.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llmjp.errors import UserError

PAGE = 4096
"""Alignment that all common disks and file systems accept for direct writes."""

MIN_DIRECT_BYTES = 1 << 18
"""Shorter writes are left to the page cache, as each direct write waits for the disk."""

BOUNCE_BYTES = 1 << 22
"""Memory through which data with another alignment is written."""

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
"""An array of bytes."""


def aligned_memory(size: int) -> Bytes:
    """Return memory that starts at a page."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


@contextmanager
def disk_full_as_user_error() -> Iterator[None]:
    """Report a full disk or an exhausted quota as an error of the user."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserError("the disk is full; the output was not created") from error
        raise


class FileWriter:
    """Writes ranges of an existing file; for one thread."""

    def __init__(self, path: Path) -> None:
        self._cached = os.open(path, os.O_WRONLY)
        self._direct = _open_direct(path)
        self._bounce: Bytes | None = None

    def close(self) -> None:
        """Close the file."""
        for descriptor in (self._cached, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write a range.

        Raises:
            UserError: the disk is full.
        """
        data = memoryview(data)
        start = min(-offset % PAGE, len(data))
        end = start + (len(data) - start) // PAGE * PAGE
        if self._direct is None or end - start < MIN_DIRECT_BYTES:
            write_at(self._cached, offset, data)
            return
        write_at(self._cached, offset, data[:start])
        for at in range(start, end, BOUNCE_BYTES):
            self._write_pages(offset + at, data[at : min(at + BOUNCE_BYTES, end)])
        write_at(self._cached, offset + end, data[end:])

    def _write_pages(self, offset: int, data: memoryview) -> None:
        """Write whole pages directly, or through the page cache if that is refused."""
        pages = np.frombuffer(data, np.uint8)
        if pages.ctypes.data % PAGE:
            if self._bounce is None:
                self._bounce = aligned_memory(BOUNCE_BYTES)
            self._bounce[: len(pages)] = pages
            data = memoryview(self._bounce[: len(pages)].data)
        done = 0
        try:
            while self._direct is not None and done < len(data) and done % PAGE == 0:
                with disk_full_as_user_error():
                    done += os.pwrite(self._direct, data[done:], offset + done)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED or self._direct is None:
                raise
            os.close(self._direct)
            self._direct = None
        write_at(self._cached, offset + done, data[done:])

    def start_writeback(self, offset: int, length: int) -> None:
        """Start to write a range from the page cache to disk, without waiting for it.

        Otherwise Linux keeps up to a tenth of the memory until fsync is called, while the disk is
        idle. ``POSIX_FADV_DONTNEED`` starts the write and releases only pages that are on disk
        already (mm/fadvise.c); Python has no ``sync_file_range``.
        """
        if self._direct is None:
            advise(self._cached, offset, length, os.POSIX_FADV_DONTNEED)


def _open_direct(path: Path) -> int | None:
    """Open a file for direct writes; return None where they do not exist."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | flag)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return None


def write_at(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """Write bytes at an offset of a file, through the page cache.

    Raises:
        UserError: the disk is full.
    """
    view = memoryview(data)
    done = 0
    with disk_full_as_user_error():
        while done < len(view):
            done += os.pwrite(descriptor, view[done : done + BOUNCE_BYTES], offset + done)


def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
    """Call ``posix_fadvise``; file systems that do not support it are unaffected."""
    with suppress(OSError):
        os.posix_fadvise(descriptor, offset, length, advice)


def reserve(path: Path, size: int) -> None:
    """Allocate the blocks of an existing file; file systems without this are unaffected.

    Threads write to allocated blocks of a file at the same time, and to others one by one.

    Raises:
        UserError: the disk is full.
    """
    # Without support in the file system, glibc would write to every block, except with O_APPEND.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        with disk_full_as_user_error():
            os.posix_fallocate(descriptor, 0, size)
    except OSError:
        pass
    finally:
        os.close(descriptor)
