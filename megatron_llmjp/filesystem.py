"""Files on disk: durable and atomic writes, checksums, file locks, retries, process liveness.

:func:`acquire_lock` is the project's only lock, used for save folders (``checkpoint/run_lock.py``),
sample indices, conversions and unfinished datasets. The kernel releases it when its process ends,
however it ends. File-system errors are interpreted here, once:

- the lock is held by another process: ``BlockingIOError``, and nothing else;
- the file system has no locks (some Lustre and FUSE mounts, NFS without its lock service): the
  lock is returned with :attr:`FileLock.is_enforced` False;
- the server is unavailable or restarts (ESTALE, EIO, ...): retried for some seconds;
- any other error, such as EACCES, EROFS or ENOSPC: the ``OSError``, with the file's name.

``fcntl.lockf`` instead of ``flock``: a forked data worker that outlives its rank does not inherit
it, and NFS and Lustre propagate it to other machines. The ``filelock`` library is not used: it
treats every error as a held lock, and its locks are inherited by forked processes. One process must
not take the same lock twice: closing either descriptor releases both.
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
from typing import IO, Any, TypeVar

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
"""Errors of a network file system whose server is unavailable or restarts."""

NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a full disk, an exceeded quota or file-size limit."""

RETRY_PAUSES = (0.1, 0.4, 1.5, 5.0, 10.0)
"""Seconds between the attempts of :func:`retry_transient`."""

_Result = TypeVar("_Result")

_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


def no_heartbeat() -> None:
    """Do nothing: the heartbeat of work that is not monitored."""


def warn(text: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def retry_transient(
    action: Callable[[], _Result],
    subject: str,
    report: Callable[[str], None] = warn,
    pauses: Sequence[float] = RETRY_PAUSES,
) -> _Result:
    """Call ``action``, and retry for some seconds while it fails with a transient error.

    Args:
        action: may be called several times.
        subject: the subject of the warning, such as a path.
        report: receives one warning, at the first failure.
        pauses: seconds between the attempts.

    Raises:
        OSError: a permanent error immediately; a transient one that persists.
    """
    for number, pause in enumerate(pauses):
        try:
            return action()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                raise
            if number == 0:
                report(f"{subject}: {error.strerror}; retrying for {sum(pauses):.0f} s")
            time.sleep(pause)
    return action()


@contextmanager
def name_path_in_errors(path: Path) -> Iterator[None]:
    """Add ``path`` to an ``OSError`` of the body that has no file name, as of write or fsync."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replaced_file(path: Path, errors: str = "strict") -> Iterator[IO[str]]:
    """Replace a text file atomically and durably: readers and crashes see the old or new content.

    Yields:
        A temporary file, which takes the name of ``path`` when the block ends without an error.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors=errors) as stream:
            yield stream
            with name_path_in_errors(path):
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_path(path.parent)


def write_atomically(path: Path, text: str, errors: str = "strict") -> None:
    """Write a whole text by :func:`replaced_file`."""
    with replaced_file(path, errors) as stream, name_path_in_errors(path):
        stream.write(text)


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a file's contents, read 4 MiB at a time."""
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def evenly_spaced_offsets(total: int, size: int, count: int) -> list[int]:
    """Return the offsets of ``count`` blocks of ``size`` spread evenly over ``total``, ascending.

    Coinciding offsets are returned once: a total of at most one block gives offset 0 only.
    """
    last = max(0, total - size)
    return sorted({number * last // (count - 1) for number in range(count)})


def nearest_existing(folder: Path) -> Path:
    """Return the folder or its nearest existing parent; a dangling link counts as existing."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def why_not_writable(folder: Path) -> str | None:
    """Return why files cannot be written to a folder, or None; the folder need not exist yet."""
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
    """Return whether a process of this machine exists, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class FileLock:
    """A lock held by this process, from :func:`acquire_lock`."""

    def __init__(self, path: Path, descriptor: int, is_enforced: bool) -> None:
        self.path = path
        self.is_enforced = is_enforced
        """Whether the kernel prevents other processes from taking it."""
        self._descriptor = descriptor

    def is_current(self) -> bool:
        """Return whether the locked file still exists under its path; a removed one has no effect.

        Raises:
            OSError: the file system does not respond.
        """
        return _has_name(self._descriptor, self.path)

    def release(self, remove: bool = False) -> None:
        """Release the lock; with ``remove``, delete its file before."""
        with suppress(OSError):
            if remove and self.is_current():
                self.path.unlink()
        with suppress(OSError):
            os.close(self._descriptor)


def acquire_lock(path: Path, retry: bool = True) -> FileLock:
    """Lock a file, which is created if needed.

    Args:
        path: the file; its folder must exist.
        retry: retry for some seconds when the file system's server does not respond.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be created or locked, or a transient error persists.
    """
    pauses = RETRY_PAUSES if retry else ()
    with name_path_in_errors(path):
        try:
            return retry_transient(partial(_take, path), str(path), pauses=pauses)
        except OSError as error:
            if error.errno != errno.ENOLCK:  # persists on NFS without its lock service
                raise
            return FileLock(path, _open(path), is_enforced=False)


def _take(path: Path) -> FileLock:
    while True:
        descriptor = _open(path)
        try:
            lock = FileLock(path, descriptor, _lock(descriptor))
            # The last holder may have removed the file between open and lock.
            if not lock.is_enforced or lock.is_current():
                return lock
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _lock(descriptor: int) -> bool:
    """Lock an open file; return False if the file system has no locks."""
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
    """Rename (work file, final file) pairs in order; .idx files must come last.

    Old .idx files are removed first, so that none is ever found next to a new .bin.
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
    """Create a work folder, and remove it with its remaining contents at the end."""
    if folder.exists():
        shutil.rmtree(folder)  # from a killed process
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise UserError if one of these files exists and ``overwrite`` is False."""
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"{', '.join(existing[:3])} already exists. Choose another output, or pass --overwrite "
            "to replace it."
        )


def write_json_durably(path: Path, content: Any) -> None:
    """Write a JSON file as :func:`write_atomically` does; lone surrogates are escaped."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text, errors="backslashreplace")
