"""One run per save folder: the second one refuses, and a dead one's place is taken.

Two files lie in the save folder. ``.run.lock`` is locked by the kernel (``fcntl.lockf``) for as
long as the run's first process lives. ``.run.json`` says who that is, is touched every
:data:`HEARTBEAT_SECONDS` and is removed at an orderly end.

Why it is safe. On one machine the kernel's lock alone decides: it ends with the process, however
that dies, and is not inherited by the workers that it forks, which may outlive it. Over machines
the same holds where the file system passes locks on (NFS, Lustre mounted with ``flock``). Where it
does not, whoever gets the lock although another machine's run is on record watches that run's
heartbeat and takes over only after :data:`PATIENCE_SECONDS` without one; no clocks are compared.
A run that was merely frozen that long finds another's name on record and publishes nothing more:
:meth:`RunLock.check` is called before a checkpoint gets its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_llmjp.errors import UserError
from megatron_llmjp.system import process_lives

LOCK = ".run.lock"
RECORD = ".run.json"
HEARTBEAT_SECONDS = 20.0
PATIENCE_SECONDS = 120.0
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


class LostLock(RuntimeError):
    """Another run has taken the save folder."""


class RunLock:
    """A save folder that is this run's; see :func:`taken`."""

    def __init__(self, root: Path, owner: Owner, descriptor: int, left_by: Owner | None) -> None:
        self.root, self.owner = root, owner
        self.left_by = left_by
        """The run that ended without giving the folder back, if there was one."""
        self._descriptor = descriptor
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Make sure that the folder is still this run's.

        Raises:
            LostLock: another run has taken it, while this one seemed dead.
        """
        now = read_owner(self.root)
        if now is None or now.token != self.owner.token:
            raise LostLock(f"{self.root} was taken by {now or 'another run'} meanwhile")

    def release(self) -> None:
        """Give the folder back, as an orderly end does."""
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(LostLock, OSError):
            self.check()
            (self.root / RECORD).unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # works on a full disk, too
                os.utime(self.root / RECORD)


@contextlib.contextmanager
def taken(
    root: Path, say: Callable[[str], None], patience: float = PATIENCE_SECONDS
) -> Iterator[RunLock]:
    """Hold a save folder, which is made if need be.

    Args:
        root: the save folder.
        say: told what is waited for, and whose place is taken.
        patience: seconds without a heartbeat after which another machine's run is dead.

    Raises:
        UserError: another run holds it, or it cannot be written to.
    """
    lock = _take(root, say, patience)
    try:
        yield lock
    finally:
        lock.release()


def _take(root: Path, say: Callable[[str], None], patience: float) -> RunLock:
    descriptor = _open(root)
    try:
        is_locked = _try_lock(descriptor, root)
        left_by = read_owner(root)
        if left_by is not None:
            _make_sure_it_is_dead(root, left_by, is_locked, say, patience)
        owner = Owner(
            socket.gethostname(),
            _boot(),
            os.getpid(),
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            uuid.uuid4().hex,
        )
        _sign(root, owner)
        if left_by is not None and not (is_locked and left_by.boot == owner.boot):
            time.sleep(min(SETTLE_SECONDS, patience))
            _refuse_if_not(root, owner)
    except BaseException:
        os.close(descriptor)
        raise
    if left_by is not None:
        say(f"{root}: taking the place of {left_by}, which ended without closing its run")
    return RunLock(root, owner, descriptor, left_by)


def _open(root: Path) -> int:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"--save {root}: cannot be written to: {error.strerror}. Name another folder, or "
            "change its permissions"
        ) from None


def _try_lock(descriptor: int, root: Path) -> bool:
    """Lock the file; False where the file system knows no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _refusal(root, read_owner(root)) from None
    except OSError:
        return False
    return True


def _make_sure_it_is_dead(
    root: Path, owner: Owner, is_locked: bool, say: Callable[[str], None], patience: float
) -> None:
    if owner.boot == _boot():
        if not is_locked and process_lives(owner.pid):
            raise _refusal(root, owner)
        return
    say(
        f"{root} is marked as in use by {owner}: waiting {patience:g} s for a sign of life before "
        "taking over"
    )
    end = time.monotonic() + patience
    first = _pulse(root)
    while time.monotonic() < end:
        time.sleep(min(1.0, patience / 10))
        if _pulse(root) not in (first, None):
            raise _refusal(root, owner)


def _refuse_if_not(root: Path, owner: Owner) -> None:
    now = read_owner(root)
    if now is None or now.token != owner.token:
        raise _refusal(root, now)


def _refusal(root: Path, owner: Owner | None) -> UserError:
    return UserError(
        f"--save {root} is in use by another run ({owner or 'which is just starting'}): stop that "
        "one, or give this one a folder of its own"
    )


def _pulse(root: Path) -> int | None:
    """When the record was last touched; opened, so that network file systems ask the server."""
    try:
        with (root / RECORD).open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except OSError:
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _sign(root: Path, owner: Owner) -> None:
    temporary = root / f"{RECORD}.{owner.token}.tmp"
    try:
        temporary.write_text(json.dumps(asdict(owner)) + "\n", encoding="utf-8")
        temporary.replace(root / RECORD)
    except OSError as error:
        raise UserError(f"--save {root}: cannot be written to: {error.strerror}") from None


def is_alive(root: Path, owner: Owner) -> bool:
    """Whether the run on record seems to live, for those who only look; nothing is locked.

    On this machine its process tells, on another one the age of its last heartbeat by the clocks
    of both.
    """
    if owner.boot == _boot():
        return process_lives(owner.pid)
    pulse = _pulse(root)
    return pulse is not None and time.time() - pulse / 1e9 < PATIENCE_SECONDS


def read_owner(root: Path) -> Owner | None:
    """Who is on record as writing to ``root``; None for nobody. Reads only."""
    try:
        return Owner(**json.loads((root / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return Owner("an unknown machine", "", 0, "an unknown time", "")
