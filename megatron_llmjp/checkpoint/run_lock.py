"""One run per save folder: the second one refuses, and a dead one's place is taken.

Two files are in the save folder. ``.run.lock`` is locked by the kernel (``filesystem.py``) for as
long as the run's first process lives. ``.run.json`` says who that is, is touched every
:data:`HEARTBEAT_SECONDS` and is removed at an orderly end.

Why it is safe. On one machine the kernel's lock alone decides: it ends with the process, however
that dies, and is not inherited by the workers that it forks, which may outlive it. Over machines
the same holds where the file system passes locks on (NFS, Lustre mounted with ``flock``). Where it
does not, whoever gets the lock although another machine's run is on record watches that run's
heartbeat and takes over only after :data:`HEARTBEAT_TIMEOUT_SECONDS` without one; no clocks are
compared.
A run that was merely frozen that long finds another's name on record and publishes nothing more:
:meth:`RunLock.check` is called before a checkpoint gets its name.
"""

from __future__ import annotations

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

Report = Callable[[str], None]

LOCK = ".run.lock"
RECORD = ".run.json"
HEARTBEAT_SECONDS = 20.0
HEARTBEAT_TIMEOUT_SECONDS = 120.0
"""A run on another machine whose heart has not beaten for so long is dead."""
SETTLE_SECONDS = 2.0
"""Of two that take over from two machines at once, the later one to sign stays."""


@dataclass(frozen=True)
class Owner:
    """Who writes to a save folder."""

    host: str
    boot: str
    """Of the running kernel: its locks can be trusted where this is equal."""
    pid: int
    started: str
    """When it took the folder, UTC."""
    token: str
    """Different for every run."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


UNKNOWN = Owner("an unknown machine", "", 0, "an unknown time", "")
"""The owner in a damaged record."""


class LockLostError(RunError):
    """Another run has taken the save folder."""


class RunLock:
    """A save folder that is this run's; see :func:`lock_save_folder`."""

    def __init__(
        self, root: Path, owner: Owner, lock: FileLock, left_by: Owner | None, say: Report
    ) -> None:
        self.root, self.owner = root, owner
        self.left_by = left_by
        """The run that ended without giving the folder back, if there was one."""
        self._lock, self._say = lock, say
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Make sure that the folder is still this run's.

        A folder or lock file that was deleted is recreated, with a warning.

        Raises:
            LockLostError: another run has taken it, while this one seemed dead.
            OSError: the folder cannot be read or written; transient errors have lasted.
        """
        now = retry_transient(lambda: _read_record(self.root), str(self.root), self._say)
        if now is None or now is UNKNOWN:
            self._take_again(RECORD)
        elif now.token != self.owner.token:
            raise LockLostError(f"--save {self.root} was taken by {now} meanwhile")
        elif not retry_transient(self._lock.is_current, str(self.root), self._say):
            self._take_again(LOCK)

    def release(self) -> None:
        """Give the folder back, as an orderly end does."""
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(OSError):
            now = _read_record(self.root)
            if now is not None and now.token == self.owner.token:
                (self.root / RECORD).unlink()
        self._lock.release()

    def _take_again(self, missing: str) -> None:
        """Take the folder like a new run, after it or a file of it was deleted."""
        what = self.root / missing if self.root.is_dir() else self.root
        self.root.mkdir(parents=True, exist_ok=True)
        if not self._lock.is_current():
            try:
                lock = acquire_lock(self.root / LOCK)
            except BlockingIOError:
                raise LockLostError(
                    f"--save {self.root} was taken by another run meanwhile"
                ) from None
            self._lock.release()
            self._lock = lock
        _write_record(self.root, self.owner)
        self._say(f"{what} was deleted or damaged during the run, and is made again")

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # works on a full disk, too
                os.utime(self.root / RECORD)


@contextlib.contextmanager
def lock_save_folder(
    root: Path, say: Report, patience: float = HEARTBEAT_TIMEOUT_SECONDS
) -> Iterator[RunLock]:
    """Hold a save folder, which is made if need be.

    Args:
        root: the save folder.
        say: receives warnings: what is waited for, and whose place is taken.
        patience: seconds without a heartbeat after which another machine's run is dead.

    Raises:
        UserError: another run holds it, or it cannot be written to.
        RunError: its file system does not answer.
    """
    try:
        lock = _acquire(root, say, patience)
    except OSError as error:
        raise _access_error(root, error) from None
    try:
        yield lock
    finally:
        lock.release()


def _acquire(root: Path, say: Report, patience: float) -> RunLock:
    lock = _acquire_file_lock(root)
    try:
        left_by = retry_transient(lambda: _read_record(root), str(root), say)
        if left_by is not None:
            _check_owner_is_dead(root, left_by, lock.is_enforced, say, patience)
        owner = Owner(
            socket.gethostname(),
            _boot_id(),
            os.getpid(),
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            uuid.uuid4().hex,
        )
        retry_transient(lambda: _write_record(root, owner), str(root), say)
        if left_by is not None and not (lock.is_enforced and left_by.boot == owner.boot):
            time.sleep(min(SETTLE_SECONDS, patience))
            now = retry_transient(lambda: _read_record(root), str(root), say)
            if now is None or now.token != owner.token:
                raise _in_use_error(root, now)
    except BaseException:
        lock.release()
        raise
    if left_by is not None:
        say(f"{root}: taking the place of {left_by}, which ended without closing its run")
    return RunLock(root, owner, lock, left_by, say)


def _acquire_file_lock(root: Path) -> FileLock:
    retry_transient(lambda: root.mkdir(parents=True, exist_ok=True), str(root))
    try:
        return acquire_lock(root / LOCK)
    except BlockingIOError:
        raise _in_use_error(root, read_owner(root)) from None


def _access_error(root: Path, error: OSError) -> UserError | RunError:
    """What kept a run from taking its folder: a user's mistake, or a file system's failure."""
    what = f"--save {root}: cannot be written to: {error.strerror}"
    if error.filename and str(error.filename) != str(root):
        what += f" ({error.filename})"
    if error.errno in TRANSIENT_ERRORS:
        return RunError(f"{what}. Its file system does not answer; try again when it does")
    if error.errno in NO_SPACE_ERRORS:
        return UserError(f"{what}. Free some space there, or name another folder")
    return UserError(f"{what}. Name another folder, or change its permissions")


def _check_owner_is_dead(
    root: Path, owner: Owner, is_locked: bool, say: Report, patience: float
) -> None:
    if owner.boot == _boot_id():
        if not is_locked and process_exists(owner.pid):
            raise _in_use_error(root, owner)
        return
    say(
        f"{root} is marked as in use by {owner}: waiting {patience:g} s for a sign of life before "
        "taking over"
    )
    end = time.monotonic() + patience
    first = _last_heartbeat(root)
    while time.monotonic() < end:
        time.sleep(min(1.0, patience / 10))
        if _last_heartbeat(root) not in (first, None):
            raise _in_use_error(root, owner)


def _in_use_error(root: Path, owner: Owner | None) -> UserError:
    return UserError(
        f"--save {root} is in use by another run ({owner or 'which is just starting'}): stop that "
        "one, or give this one a folder of its own"
    )


def _last_heartbeat(root: Path) -> int | None:
    """When the record was last touched; opened, so that network file systems ask the server."""
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
    """Whether the run on record seems to live, for those who only look; nothing is locked.

    On this machine its process tells, on another one the age of its last heartbeat by the clocks
    of both.
    """
    if owner.boot == _boot_id():
        return process_exists(owner.pid)
    pulse = _last_heartbeat(root)
    return pulse is not None and time.time() - pulse / 1e9 < HEARTBEAT_TIMEOUT_SECONDS


def refuse_if_in_use(root: Path) -> None:
    """Refuse a folder that another run seems to write to; nothing is locked.

    Raises:
        UserError: naming that run.
    """
    owner = read_owner(root)
    if owner is not None and is_owner_alive(root, owner):
        raise _in_use_error(root, owner)


def read_owner(root: Path) -> Owner | None:
    """Who is on record as writing to ``root``; None for nobody. Reads only."""
    try:
        return _read_record(root)
    except OSError:
        return UNKNOWN


def _read_record(root: Path) -> Owner | None:
    """The record; None where there is none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return Owner(**json.loads((root / RECORD).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        return UNKNOWN
