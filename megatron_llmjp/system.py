"""What several parts ask of the operating system: files on disk, their sums, living processes."""

from __future__ import annotations

import errno
import os
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ENOLCK,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
        errno.ENOTCONN,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ESHUTDOWN,
    }
)
"""Errors of a network file system whose server is away or restarts, and which may pass."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The disk, the user's quota or the file-size limit takes no more."""

RETRY_PAUSES = (0.1, 0.4, 1.5, 5.0, 10.0)
"""Seconds between the attempts of :func:`retried`."""

_Result = TypeVar("_Result")


def no_heartbeat() -> None:
    """For work that nothing watches."""


def warn(text: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def retried(
    action: Callable[[], _Result],
    what: str,
    say: Callable[[str], None] = warn,
    pauses: Sequence[float] = RETRY_PAUSES,
) -> _Result:
    """Call ``action``, and again for some seconds while it fails with a transient error.

    Args:
        action: may be called several times.
        what: the subject of the warning, such as a path.
        say: receives one warning, at the first failure.
        pauses: seconds between the attempts.

    Raises:
        OSError: a permanent error at once; a transient one that lasts.
    """
    for number, pause in enumerate(pauses):
        try:
            return action()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            if number == 0:
                say(f"{what}: {error.strerror}; retrying for {sum(pauses):.0f} s")
            time.sleep(pause)
    return action()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name ``path`` in errors that name no file: a failed write or fsync does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old or the new one whole.

    Raises:
        OSError: the file cannot be written; no temporary file is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        with naming(path), temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's bytes, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's bytes, read 4 MiB at a time."""
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def spread(total: int, size: int, count: int) -> list[int]:
    """Where ``count`` blocks of ``size`` begin that are spread evenly over ``total``, at most once.

    Fewer where they would coincide: a total of one block or less has one, at 0.
    """
    last = max(0, total - size)
    return sorted({number * last // (count - 1) for number in range(count)})


def existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists; a link without a target exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def unusable(folder: Path) -> str | None:
    """Why files cannot be written to a folder, which may be created first; None if they can."""
    place = existing(folder)
    try:
        if place.is_symlink() and not place.exists():
            return f"{place} is a symbolic link to {place.readlink()}, which does not exist"
        if not place.is_dir():
            return f"{place} is a file"
    except OSError as error:
        return f"{place}: {error.strerror}"
    effective = os.access in os.supports_effective_ids
    if os.access(place, os.W_OK | os.X_OK, effective_ids=effective):
        return None
    reason = "is on a read-only file system" if _is_read_only(place) else "is not writable"
    return f"{place} {reason}"


def _is_read_only(place: Path) -> bool:
    try:
        return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def process_lives(pid: int) -> bool:
    """Whether a process of this machine lives, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
