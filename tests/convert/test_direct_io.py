"""Direct writes, compared with the bytes that were to be written."""

from __future__ import annotations

import errno
import os
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_llmjp.convert.files import direct_io
from megatron_llmjp.convert.files.direct_io import PAGE, FileWriter, aligned_memory, reserve
from megatron_llmjp.errors import UserError

SIZE = 64 * PAGE
WRITES = [(0, 0, 64 * PAGE), (1, 1, 9 * PAGE), (3 * PAGE, 0, 4 * PAGE), (PAGE + 7, 7, 5000)]
"""Offset in the file, offset in memory (of the same page or not), bytes."""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(direct_io, "MIN_DIRECT_BYTES", PAGE)
    monkeypatch.setattr(direct_io, "BOUNCE_BYTES", 2 * PAGE)
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    return path


def memory(shift: int, size: int) -> memoryview:
    found = aligned_memory(size + PAGE)[shift:][:size]
    found[...] = np.frombuffer(random.Random(size).randbytes(size), np.uint8)
    return memoryview(found.data)


@pytest.mark.parametrize("place,shift,size", WRITES)
@pytest.mark.parametrize("moved", [0, 3])
def test_any_range_is_written(file, place, shift, size, moved):
    """Whether the memory has the alignment of the file or not."""
    data = memory(shift + moved, min(size, SIZE - place))
    with closing(FileWriter(file)) as writer:
        writer.write(place, data)
        writer.write(2, b"1234")
    expected = bytearray(SIZE)
    expected[place : place + len(data)] = data
    expected[2:6] = b"1234"
    assert file.read_bytes() == expected


def is_direct(descriptor: int) -> bool:
    content = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    flags = next(line for line in content.splitlines() if line.startswith("flags:"))
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)


def record_direct_writes(monkeypatch: Any, result: Any) -> list[tuple[int, int]]:
    """Record offset and size of direct writes, and call ``result`` with their arguments."""
    found: list[tuple[int, int]] = []
    write = os.pwrite

    def replaced(descriptor: int, data: memoryview, offset: int) -> int:
        if not is_direct(descriptor):
            return write(descriptor, data, offset)
        found.append((offset, len(data)))
        written: int = result(write, descriptor, data, offset)
        return written

    monkeypatch.setattr(os, "pwrite", replaced)
    return found


def test_whole_pages_are_written_directly(file, monkeypatch):
    """Independently of the memory, so that processes agree which pages are in the page cache."""
    for shift in (5, 6):
        with monkeypatch.context() as context:
            found = record_direct_writes(context, lambda write, *arguments: write(*arguments))
            with closing(FileWriter(file)) as writer:
                writer.write(5, memory(shift, 4 * PAGE))
            if not found:
                pytest.skip("the file system of the tests has no direct writes")
            assert found == [(PAGE, 2 * PAGE), (3 * PAGE, PAGE)]


def refuse(*_: Any) -> int:
    raise OSError(errno.EINVAL, "Invalid argument")


def fill(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def write_half_a_page(write: Any, descriptor: int, data: memoryview, offset: int) -> int:
    other = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY)
    try:
        return int(write(other, data[: PAGE // 2], offset))
    finally:
        os.close(other)


@pytest.mark.parametrize("result", [refuse, write_half_a_page])
def test_refused_and_short_direct_writes_are_completed(file, monkeypatch, result):
    record_direct_writes(monkeypatch, result)
    data = memory(0, 8 * PAGE)
    with closing(FileWriter(file)) as writer:
        writer.write(0, data)
        writer.write(8 * PAGE, data)
    assert file.read_bytes()[: 16 * PAGE] == bytes(data) * 2


def test_a_full_disk_is_reported(file, monkeypatch):
    if not record_direct_writes(monkeypatch, fill) and direct_io._open_direct(file) is None:
        pytest.skip("the file system of the tests has no direct writes")
    with closing(FileWriter(file)) as writer, pytest.raises(UserError, match="disk is full"):
        writer.write(0, memory(0, 8 * PAGE))


def test_without_direct_writes(file, monkeypatch):
    monkeypatch.setattr(direct_io, "_open_direct", lambda _: None)
    data = memory(0, 8 * PAGE)
    with closing(FileWriter(file)) as writer:
        writer.write(3, data)
        writer.start_writeback(3, len(data))
    assert file.read_bytes()[3 : 3 + len(data)] == data


def test_reserved_blocks_keep_the_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"head")
    reserve(path, 1 << 20)
    assert path.read_bytes()[:8] == b"head\0\0\0\0" and path.stat().st_size == 1 << 20


def test_file_systems_without_reservation(tmp_path, monkeypatch):
    def refused(*_: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr(os, "posix_fallocate", refused)
    reserve(path, 10)
    monkeypatch.setattr(os, "posix_fallocate", fill)
    with pytest.raises(UserError, match="disk is full"):
        reserve(path, 10)
