"""Files on disk: durable and atomic writes, checksums, locks, living processes.

What several parts ask of the operating system: files on disk, their sums, living processes.

A lock on a file that the kernel frees when its process ends, however it ends.

The only lock of the project: on save folders (``checkpoint/run_lock.py``), sample indices,
conversions and unfinished datasets. What each does without a lock, or while another
process has it, is its own affair; what an error of the file system means is decided here, once:

- the lock is taken: ``BlockingIOError``, and nothing else;
- the file system has no locks (some Lustre and FUSE mounts, NFS without its lock service): the
  lock is held in name only, :attr:`FileLock.is_enforced` is False;
- the server is away or restarts (ESTALE, EIO, ...): tried again for some seconds;
- anything else, such as EACCES, EROFS or ENOSPC: the ``OSError``, with the file's name.

``fcntl.lockf`` rather than ``flock``: a forked data worker that outlives its rank does not inherit
it, and NFS and Lustre pass it on to other machines. The library ``filelock`` would not do: it takes
every error for a taken lock, and its locks are inherited. One process must not take the same lock
twice: closing either would free both.

Files appear under their final names only when they are whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_llmjp.errors import UserError

TRANSIENT_ERRORS = frozenset(
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

NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The disk, the user's quota or the file-size limit takes no more."""

RETRY_PAUSES = (0.1, 0.4, 1.5, 5.0, 10.0)
"""Seconds between the attempts of :func:`retry_transient`."""

_Result = TypeVar("_Result")


def no_heartbeat() -> None:
    """For work that nothing watches."""


def warn(text: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def retry_transient(
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
            if error.errno not in TRANSIENT_ERRORS:
                raise
            if number == 0:
                say(f"{what}: {error.strerror}; retrying for {sum(pauses):.0f} s")
            time.sleep(pause)
    return action()


@contextmanager
def name_path_in_errors(path: Path) -> Iterator[None]:
    """Name ``path`` in errors that name no file: a failed write or fsync does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old or the new one whole.

    Raises:
        OSError: the file cannot be written; no temporary file is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        with name_path_in_errors(path), temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's bytes, read 4 MiB at a time."""
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def evenly_spaced_offsets(total: int, size: int, count: int) -> list[int]:
    """Where ``count`` blocks of ``size`` begin that are spread evenly over ``total``, at most once.

    Fewer where they would coincide: a total of one block or less has one, at 0.
    """
    last = max(0, total - size)
    return sorted({number * last // (count - 1) for number in range(count)})


def nearest_existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists; a link without a target exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def why_not_writable(folder: Path) -> str | None:
    """Why files cannot be written to a folder, which may be created first; None if they can."""
    place = nearest_existing(folder)
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


def process_exists(pid: int) -> bool:
    """Whether a process of this machine lives, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class FileLock:
    """A lock that this process holds, from :func:`acquire_lock`."""

    def __init__(self, path: Path, descriptor: int, is_enforced: bool) -> None:
        self.path = path
        self.is_enforced = is_enforced
        """Whether the kernel keeps others from taking it."""
        self._descriptor = descriptor

    def is_current(self) -> bool:
        """Whether the locked file still has its name: a removed one protects nothing.

        Raises:
            OSError: the file system does not answer.
        """
        return _has_name(self._descriptor, self.path)

    def release(self, remove: bool = False) -> None:
        """Free the lock, and remove its file while still holding it if ``remove``."""
        with suppress(OSError):
            if remove and self.is_current():
                self.path.unlink()
        with suppress(OSError):
            os.close(self._descriptor)


def acquire_lock(path: Path, patient: bool = True) -> FileLock:
    """Take the lock of a file, which is made if need be.

    Args:
        path: the file; its folder must exist.
        patient: try again for some seconds where the file system's server does not answer.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file cannot be made or locked; a transient error has lasted.
    """
    pauses = RETRY_PAUSES if patient else ()
    with name_path_in_errors(path):
        try:
            return retry_transient(partial(_take, path), str(path), pauses=pauses)
        except OSError as error:
            if error.errno != errno.ENOLCK:  # for a while, or always without NFS's lock service
                raise
            return FileLock(path, _open(path), is_enforced=False)


def _take(path: Path) -> FileLock:
    while True:
        descriptor = _open(path)
        try:
            lock = FileLock(path, descriptor, _lock(descriptor))
            # Its last holder may have removed the file between our opening and locking it.
            if not lock.is_enforced or lock.is_current():
                return lock
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _lock(descriptor: int) -> bool:
    """Lock an open file; False where the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def rename_into_place(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Rename (work file, final file) pairs in their order; give .idx files last.

    An old .idx goes first: it must never stand beside a new .bin.
    """
    for _, final in pairs:
        if final.suffix == ".idx":
            final.unlink(missing_ok=True)
    for work, final in pairs:
        work.replace(final)
    for folder in {final.parent for _, final in pairs}:
        fsync_path(folder)


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Make a work folder, and remove it at the end with all that is still in it."""
    if folder.exists():
        shutil.rmtree(folder)  # left behind by a killed run
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise UserError if any of these files exists and may not be replaced."""
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise UserError(
            f"{', '.join(there[:3])} exists already. Choose another output, or give --overwrite "
            "to replace it."
        )


def write_json_durably(path: Path, content: Any) -> None:
    """Write JSON and bring it to disk."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
