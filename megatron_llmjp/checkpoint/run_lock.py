"""Lock of a save folder: one run at a time writes to it, and takeover from a dead run.

The save folder contains two files. ``.run.lock`` is locked by the kernel (``filesystem.py``) while
rank 0 of the run exists. ``.run.json`` records the owner; its modification time is updated every
:data:`HEARTBEAT_SECONDS`, and it is removed at a regular exit.

On one machine the kernel's lock is sufficient: it is released when the process exits for any
reason, and is not inherited by forked data workers, which may outlive the process. Between machines
the same holds if the file system supports locks (NFS, Lustre mounted with ``flock``). If it does
not, a run that gets the lock while the owner record names another machine monitors the heartbeat of
that owner, and takes over after :data:`HEARTBEAT_TIMEOUT_SECONDS` without one; clocks of different
machines are not compared. A run that was suspended longer than that finds another owner in the
record and publishes no checkpoint: :meth:`RunLock.check` is called before each checkpoint is
renamed.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_llmjp.errors import RunError, UserError
from megatron_llmjp.filesystem import (
    NO_SPACE_ERRORS,
    TRANSIENT_ERRORS,
    FileLock,
    acquire_lock,
    process_exists,
    retry_transient,
    write_atomically,
)

Warn = Callable[[str], None]

LOCK = ".run.lock"
RECORD = ".run.json"
IN_USE = "is in use by another run"
"""Part of the error of a run whose save folder another run holds."""
TIME_FORMAT = "%Y-%m-%d %H:%M:%S UTC"
HEARTBEAT_SECONDS = 20.0
HEARTBEAT_TIMEOUT_SECONDS = 120.0
"""A run on another machine without a heartbeat for this time is considered dead."""
SETTLE_SECONDS = 2.0
"""If two runs acquire or take over a folder at the same time, the last one to write the record is
the owner. Locks of the kernel, where there are any, exclude that on one machine."""


@dataclass(frozen=True)
class Owner:
    """The run that writes to a save folder."""

    host: str
    boot: str
    """Boot ID of the kernel; equal for runs on the same machine."""
    pid: int
    started: str
    """Time at which it acquired the folder, in UTC."""
    token: str
    """Unique ID of the run."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"

    @property
    def started_at(self) -> float | None:
        """:attr:`started` in seconds since the epoch; None if it is unknown."""
        try:
            return calendar.timegm(time.strptime(self.started, TIME_FORMAT))
        except (ValueError, OverflowError):
            return None


UNKNOWN = Owner("an unknown machine", "", 0, "an unknown time", "")
"""The owner if the record is damaged."""


class LockLostError(RunError):
    """Another run has acquired the save folder."""


class FolderInUseError(UserError):
    """Another run, which is alive, holds the folder."""

    def __init__(self, root: Path, owner: Owner | None) -> None:
        super().__init__(
            f"--save {root} {IN_USE} ({owner or 'which is just starting'}): stop that "
            "run, or use another folder"
        )
        self.owner = owner


class RunLock:
    """The lock of a save folder, held by this run; see :func:`lock_save_folder`."""

    def __init__(
        self, root: Path, owner: Owner, lock: FileLock, previous: Owner | None, warn: Warn
    ) -> None:
        self.root, self.owner = root, owner
        self.previous = previous
        """The owner that exited without releasing the folder, if any."""
        self._lock, self._warn = lock, warn
        self._stopped = threading.Event()
        self._heartbeat_thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heartbeat_thread.start()

    def check(self) -> None:
        """Check that this run still owns the folder.

        A deleted folder or lock file is recreated, with a warning.

        Raises:
            LockLostError: another run has acquired it, as this one had no heartbeat.
            OSError: the folder cannot be read or written; transient errors persist after retries.
        """
        current = retry_transient(lambda: _read_record(self.root), str(self.root), self._warn)
        if current is None or current is UNKNOWN:
            self._acquire_again(RECORD)
        elif current.token != self.owner.token:
            raise LockLostError(f"--save {self.root} was acquired by {current} in the meantime")
        elif not retry_transient(self._lock.is_current, str(self.root), self._warn):
            self._acquire_again(LOCK)

    def release(self) -> None:
        """Release the folder at a regular exit."""
        self._stopped.set()
        self._heartbeat_thread.join()
        with contextlib.suppress(OSError):
            current = _read_record(self.root)
            if current is not None and current.token == self.owner.token:
                (self.root / RECORD).unlink()
        self._lock.release()

    def _acquire_again(self, missing: str) -> None:
        """Acquire the folder again after it or one of its lock files was deleted."""
        path = self.root / missing if self.root.is_dir() else self.root
        self.root.mkdir(parents=True, exist_ok=True)
        if not self._lock.is_current():
            try:
                lock = acquire_lock(self.root / LOCK)
            except BlockingIOError:
                raise LockLostError(
                    f"--save {self.root} was acquired by another run in the meantime"
                ) from None
            self._lock.release()
            self._lock = lock
        _write_record(self.root, self.owner)
        self._warn(f"{path} was deleted or damaged during the run and is recreated")

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # also possible on a full disk
                os.utime(self.root / RECORD)


@contextlib.contextmanager
def lock_save_folder(
    root: Path, warn: Warn, timeout: float = HEARTBEAT_TIMEOUT_SECONDS
) -> Iterator[RunLock]:
    """Acquire a save folder for the duration of the context; it is created if missing.

    Args:
        root: the save folder.
        warn: receives warnings about waiting for or taking over from another run.
        timeout: seconds without a heartbeat after which another machine's run is considered dead.

    Raises:
        UserError: another run owns it, or it is not writable.
        RunError: its file system does not respond.
    """
    try:
        lock = acquire_folder(root, warn, timeout)
    except OSError as error:
        raise _access_error(root, error) from None
    try:
        yield lock
    finally:
        lock.release()


def acquire_folder(root: Path, warn: Warn, timeout: float = HEARTBEAT_TIMEOUT_SECONDS) -> RunLock:
    """Acquire a folder as :func:`lock_save_folder` does, until :meth:`RunLock.release`.

    Raises:
        FolderInUseError: another run owns it.
        OSError: it cannot be written, or its file system does not respond.
    """
    lock = _acquire_file_lock(root)
    try:
        previous = retry_transient(lambda: _read_record(root), str(root), warn)
        if previous is not None:
            _check_owner_is_dead(root, previous, lock.is_enforced, warn, timeout)
        owner = Owner(
            socket.gethostname(),
            _boot_id(),
            os.getpid(),
            time.strftime(TIME_FORMAT, time.gmtime()),
            uuid.uuid4().hex,
        )
        retry_transient(lambda: _write_record(root, owner), str(root), warn)
        is_takeover = previous is not None and previous.boot != owner.boot
        if is_takeover or not lock.is_enforced:
            time.sleep(min(SETTLE_SECONDS, timeout))
            current = retry_transient(lambda: _read_record(root), str(root), warn)
            if current is None or current.token != owner.token:
                raise FolderInUseError(root, current)
    except BaseException:
        lock.release()
        raise
    if previous is not None:
        warn(f"{root}: taking over from {previous}, which exited without releasing the folder")
    return RunLock(root, owner, lock, previous, warn)


def _acquire_file_lock(root: Path) -> FileLock:
    retry_transient(lambda: root.mkdir(parents=True, exist_ok=True), str(root))
    try:
        return acquire_lock(root / LOCK)
    except BlockingIOError:
        raise FolderInUseError(root, read_owner(root)) from None


def _access_error(root: Path, error: OSError) -> UserError | RunError:
    """Return the error for a folder that cannot be acquired, by the kind of ``OSError``."""
    message = f"--save {root}: not writable: {error.strerror}"
    if error.filename and str(error.filename) != str(root):
        message += f" ({error.filename})"
    if error.errno in TRANSIENT_ERRORS:
        return RunError(f"{message}. Its file system does not respond; start again when it does")
    if error.errno in NO_SPACE_ERRORS:
        return UserError(f"{message}. Free some space, or choose another folder")
    return UserError(f"{message}. Choose another folder, or change its permissions")


def _check_owner_is_dead(
    root: Path, owner: Owner, is_locked: bool, warn: Warn, timeout: float
) -> None:
    if owner.boot == _boot_id():
        if not is_locked and process_exists(owner.pid):
            raise FolderInUseError(root, owner)
        return
    warn(
        f"{root} is recorded as in use by {owner}: waiting {timeout:g} s for a heartbeat before "
        "taking over"
    )
    end = time.monotonic() + timeout
    first = _last_heartbeat(root)
    while time.monotonic() < end:
        time.sleep(min(1.0, timeout / 10))
        if _last_heartbeat(root) not in (first, None):
            raise FolderInUseError(root, owner)


def heartbeat_age(root: Path) -> float | None:
    """Return the seconds since the owner's last heartbeat, by the clocks of both machines."""
    pulse = _last_heartbeat(root)
    return None if pulse is None else time.time() - pulse / 1e9


def _last_heartbeat(root: Path) -> int | None:
    """Return the modification time of the record; opens it, so that NFS revalidates its cache."""
    try:
        with (root / RECORD).open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except OSError:
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _write_record(root: Path, owner: Owner) -> None:
    write_atomically(root / RECORD, json.dumps(asdict(owner)) + "\n")


def is_owner_alive(root: Path, owner: Owner) -> bool:
    """Whether the recorded run is probably alive; read-only, without locking.

    On this machine, checks its process; on another machine, the age of its last heartbeat, by the
    clocks of both machines.
    """
    if is_on_this_machine(owner):
        return process_exists(owner.pid)
    age = heartbeat_age(root)
    return age is not None and age < HEARTBEAT_TIMEOUT_SECONDS


def is_on_this_machine(owner: Owner) -> bool:
    """Whether the recorded run was started on this machine since it booted."""
    return owner.boot == _boot_id()


def refuse_if_in_use(root: Path) -> None:
    """Refuse a folder whose recorded run is probably alive; read-only, without locking.

    Raises:
        UserError: the folder is in use; the message names the run.
    """
    owner = read_owner(root)
    if owner is not None and is_owner_alive(root, owner):
        raise FolderInUseError(root, owner)


def read_owner(root: Path) -> Owner | None:
    """Return the recorded owner of ``root``, or None; read-only."""
    try:
        return _read_record(root)
    except OSError:
        return UNKNOWN


def _read_record(root: Path) -> Owner | None:
    """Read the owner record; None if there is none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        owner = Owner(**json.loads((root / RECORD).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, RecursionError):
        return UNKNOWN
    texts = (owner.host, owner.boot, owner.started, owner.token)
    is_valid = type(owner.pid) is int and 0 <= owner.pid < 2**31
    return owner if is_valid and all(isinstance(text, str) for text in texts) else UNKNOWN
