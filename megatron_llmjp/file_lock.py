"""A lock on a file that the kernel frees when its process ends, however it ends.

The only lock of the project: on save folders (``checkpoint/lock.py``), sample indices, conversions
and unfinished datasets. What each does without a lock, or while another process has it, is its own
affair; what an error of the file system means is decided here, once:

- the lock is taken: ``BlockingIOError``, and nothing else;
- the file system has no locks (some Lustre and FUSE mounts, NFS without its lock service): the
  lock is held in name only, :attr:`FileLock.is_enforced` is False;
- the server is away or restarts (ESTALE, EIO, ...): tried again for some seconds;
- anything else, such as EACCES, EROFS or ENOSPC: the ``OSError``, with the file's name.

``fcntl.lockf`` rather than ``flock``: a forked data worker that outlives its rank does not inherit
it, and NFS and Lustre pass it on to other machines. The library ``filelock`` would not do: it takes
every error for a taken lock, and its locks are inherited. One process must not take the same lock
twice: closing either would free both.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from megatron_llmjp.system import RETRY_PAUSES, naming, retried

_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class FileLock:
    """A lock that this process holds, from :func:`lock_file`."""

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


def lock_file(path: Path, patient: bool = True) -> FileLock:
    """Take the lock of a file, which is made if need be.

    Args:
        path: the file; its folder must exist.
        patient: try again for some seconds where the file system's server does not answer.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file cannot be made or locked; a transient error has lasted.
    """
    pauses = RETRY_PAUSES if patient else ()
    with naming(path):
        try:
            return retried(partial(_take, path), str(path), pauses=pauses)
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
