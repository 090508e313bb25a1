"""Injected faults of the save folder and its file system."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.injection import inject_at, rank


def delete_folder_at(folder: str, iteration: int) -> None:
    """Remove the save folder."""
    if rank() == 0:
        inject_at("a step", iteration, lambda _: shutil.rmtree(folder))


def take_folder_at(folder: str, iteration: int) -> None:
    """Let the run of another machine take the save folder."""
    record = Path(folder) / ".run.json"

    def take(_: Any) -> None:
        owner = {**json.loads(record.read_text()), "host": "node07", "token": "another"}
        record.write_text(json.dumps(owner))

    if rank() == 0:
        inject_at("a step", iteration, take)


def failing_lock(code: int) -> None:
    """Make locking fail with a file system error, without pauses between attempts."""
    from megatron_llmjp import filesystem

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    filesystem.fcntl.lockf = fail  # type: ignore[assignment]
    filesystem.RETRY_PAUSES = (0.0,)


def failing_save(kind: str, iteration: int, place: str = "") -> None:
    """Make writing fail from the save of an iteration until the save of the next one."""
    begin, end = OBSTACLES[kind](place)
    inject_at("a save", iteration, lambda _: begin())
    inject_at("a save", iteration + 1, lambda _: end())


def _file_size_limit(_: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Limit files to 2,000 bytes, as ``ulimit -f`` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return (
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
    )


def _read_only_folder(_: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Make the folder read-only: root becomes nobody."""
    return lambda: os.seteuid(65534), lambda: os.seteuid(0)


def _full_disk(place: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Fill the disk except for a few bytes."""
    ballast = Path(place) / f"ballast-{rank()}"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    return fill, ballast.unlink


def _quota(_: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Make writing of tensors fail with the error of an exceeded quota."""
    from megatron_llmjp.checkpoint.writer import _ChecksumStream

    write = _ChecksumStream.write

    def refused(self: Any, data: Any) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    return (
        lambda: setattr(_ChecksumStream, "write", refused),
        lambda: setattr(_ChecksumStream, "write", write),
    )


OBSTACLES: dict[str, Callable[[str], tuple[Callable[[], None], Callable[[], None]]]] = {
    "file size": _file_size_limit,
    "read-only": _read_only_folder,
    "disk full": _full_disk,
    "quota": _quota,
}
