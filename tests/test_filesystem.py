"""File locks among real processes, and the interpretation of file-system errors."""

from __future__ import annotations

import errno
import fcntl
import os
import signal

import pytest

from megatron_llmjp import filesystem
from megatron_llmjp.filesystem import acquire_lock


@pytest.fixture
def pauses(monkeypatch):
    """Make retries immediate; return the list of pauses."""
    made: list[float] = []
    monkeypatch.setattr(filesystem.time, "sleep", made.append)
    return made


def in_another_process(path) -> bool:
    """Return whether another process can take the lock."""
    child = os.fork()
    if child == 0:
        try:
            acquire_lock(path)
            os._exit(0)
        except BlockingIOError:
            os._exit(1)
        finally:
            os._exit(2)
    return {0: True, 1: False}[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "lock"
    lock = acquire_lock(path)
    assert lock.is_enforced and lock.is_current()
    assert not in_another_process(path)
    lock.release()
    assert in_another_process(path)  # released when its process ended
    lock = acquire_lock(path)
    lock.release(remove=True)
    assert not path.exists()


def test_a_lock_on_a_removed_file_has_no_effect(tmp_path):
    """Also for a process that opened the file before its removal."""
    path = tmp_path / "lock"
    lock = acquire_lock(path)
    path.unlink()
    assert not lock.is_current()
    assert in_another_process(path)
    lock.release(remove=True)  # another process's file
    assert path.exists()


def test_a_killed_owner_releases_it_though_its_worker_runs(tmp_path):
    path, ready = tmp_path / "lock", tmp_path / "ready"
    owner = os.fork()
    if owner == 0:
        acquire_lock(path)
        worker = os.fork()
        if worker:
            ready.write_text(str(worker))
        signal.pause()
        os._exit(0)
    while not (ready.exists() and ready.read_text()):
        pass
    assert not in_another_process(path)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert in_another_process(path)
    os.kill(int(ready.read_text()), signal.SIGKILL)


def failing(monkeypatch, code, times):
    """Make ``lockf`` fail ``times`` times."""
    left = [times]
    lockf = fcntl.lockf

    def fail(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return lockf(*arguments)

    monkeypatch.setattr(fcntl, "lockf", fail)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ENOLCK])
def test_transient_errors_are_retried(tmp_path, monkeypatch, pauses, capfd, code):
    failing(monkeypatch, code, 3)
    assert acquire_lock(tmp_path / "lock").is_enforced
    assert len(pauses) == 3
    assert capfd.readouterr().err.count(f"{tmp_path / 'lock'}: {os.strerror(code)}; retrying") == 1


def test_persistent_errors(tmp_path, monkeypatch, pauses):
    path = tmp_path / "lock"
    for code, kind in ((errno.ESTALE, OSError), (errno.EIO, OSError), (errno.EACCES, OSError)):
        failing(monkeypatch, code, 100)
        with pytest.raises(kind) as raised:
            acquire_lock(path)
        assert raised.value.errno == code and raised.value.filename == str(path)
        monkeypatch.undo()
        monkeypatch.setattr(filesystem.time, "sleep", pauses.append)
    assert len(pauses) == 2 * len(filesystem.RETRY_PAUSES)  # EACCES is not retried


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_file_system_without_locks(tmp_path, monkeypatch, pauses, code):
    failing(monkeypatch, code, 100)
    assert not acquire_lock(tmp_path / "lock").is_enforced


def test_a_file_that_cannot_be_created(tmp_path):
    with pytest.raises(FileNotFoundError):
        acquire_lock(tmp_path / "none" / "lock")
