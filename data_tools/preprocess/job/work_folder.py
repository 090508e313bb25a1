"""Ownership of the work folder of a job: one process writes to it, also on shared file systems."""

from __future__ import annotations

import contextlib
import glob
import secrets
import shutil
import time
from pathlib import Path

from megatron_llmjp.checkpoint.run_lock import (
    FolderInUseError,
    LockLostError,
    Owner,
    RunLock,
    acquire_folder,
)
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import warn

SECONDS_BETWEEN_CHECKS = 5.0


class FolderHeldError(UserError):
    """Another process, which is alive, writes to the work folder."""

    def __init__(self, folder: Path, owner: Owner | None) -> None:
        super().__init__(
            f"{folder}: another preprocess_data is writing this output "
            f"({owner or 'which is just starting'}). Wait until it finishes, or choose another "
            "--output-prefix."
        )
        self.owner = owner


class FolderLostError(UserError):
    """Another process took the work folder over, while this one was suspended."""


class WorkFolder:
    """A work folder that this process holds until :meth:`release`."""

    def __init__(self, folder: Path) -> None:
        """Acquire the folder, which is created if missing.

        Raises:
            FolderHeldError: another process holds it.
            OSError: it cannot be written.
        """
        self.folder = folder
        self._lock = _acquire(folder)
        self._removed: Path | None = None
        self._released = False
        self._checked = time.monotonic()

    def check(self) -> None:
        """Check that this process still holds the folder; at most every five seconds.

        A process that was suspended for longer checks before it writes anything.

        Raises:
            FolderLostError: another process has taken it over.
            OSError: the file system does not respond.
        """
        now = time.monotonic()
        if now - self._checked < SECONDS_BETWEEN_CHECKS:
            return
        self._checked = now
        try:
            self._lock.check()
        except LockLostError as error:
            raise FolderLostError(
                f"{self.folder}: another preprocess_data has taken this output over, because this "
                "process gave no sign of life for minutes. It finishes the output."
            ) from error

    def remove(self) -> None:
        """Remove the folder: at once for other processes, its files at the release.

        The folder is renamed first, so that no process finds some of its files; a network file
        system keeps a removed file, such as the lock, until it is closed.
        """
        name = f"{_removed_name(self.folder)}{secrets.token_hex(4)}"
        self._removed = self.folder.with_name(name)
        self.folder.rename(self._removed)

    def release(self) -> None:
        """Release the folder; may be called twice."""
        if not self._released:
            self._released = True
            self._lock.release()
            if self._removed is not None:
                shutil.rmtree(self._removed, ignore_errors=True)


def discard_folder(folder: Path) -> None:
    """Remove a work folder that is of no use any more, unless another process holds it."""
    for left in folder.parent.glob(f"{glob.escape(_removed_name(folder))}*"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed while removing it
    if not folder.is_dir():
        return
    with contextlib.suppress(FolderHeldError, OSError):
        held = WorkFolder(folder)
        try:
            held.remove()
        finally:
            held.release()


def _removed_name(folder: Path) -> str:
    return f".{folder.name}.removed-"


def _acquire(folder: Path) -> RunLock:
    for _ in range(3):  # another process may remove the folder meanwhile
        try:
            return acquire_folder(folder, warn)
        except FolderInUseError as error:
            raise FolderHeldError(folder, error.owner) from error
        except FileNotFoundError:
            continue
    return acquire_folder(folder, warn)
