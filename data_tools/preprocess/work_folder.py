"""Ownership of the work folder of a job: one process writes to it, also on shared file systems."""

from __future__ import annotations

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
        try:
            self._lock: RunLock = acquire_folder(folder, warn)
        except FolderInUseError as error:
            raise FolderHeldError(folder, error.owner) from error
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

    def release(self) -> None:
        """Release the folder."""
        self._lock.release()
