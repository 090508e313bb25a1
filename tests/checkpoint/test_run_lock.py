"""Lock of a save folder between processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_llmjp import filesystem
from megatron_llmjp.checkpoint import run_lock as locks
from megatron_llmjp.checkpoint.run_lock import (
    LOCK,
    RECORD,
    LockLostError,
    is_owner_alive,
    lock_save_folder,
    read_owner,
    refuse_if_in_use,
)
from megatron_llmjp.errors import RunError, UserError
from tests.support.processes import ROOT
from tests.support.timeouts import TIMEOUT

HOLD = """
import os, sys, time
from pathlib import Path
from megatron_llmjp.checkpoint.run_lock import lock_save_folder
with lock_save_folder(Path(sys.argv[1]), print, timeout=1.0) as lock:
    if os.fork() == 0:  # like a data worker, which may outlive the run
        time.sleep(60)
        os._exit(0)
    print("held", lock.previous is not None, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns ``tmp_path``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held False\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_second_run_refuses_and_a_killed_one_is_replaced(tmp_path, holder):
    owner = read_owner(tmp_path)
    assert owner is not None
    stored = json.loads((tmp_path / ".run.json").read_text())
    assert (stored["pid"], stored["host"]) == (holder.pid, socket.gethostname())
    assert stored == asdict(owner)
    with (tmp_path / ".run.lock").open("r+") as file, pytest.raises(BlockingIOError, match="temp"):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    refused = f"in use by another run .process {holder.pid} on .*since"
    with pytest.raises(UserError, match=refused), lock_save_folder(tmp_path, print):
        pass
    assert read_owner(tmp_path) == owner

    holder.kill()  # its forked child is still running
    holder.wait()
    messages: list[str] = []
    with lock_save_folder(tmp_path, messages.append) as lock:
        assert lock.previous == owner
        assert f"taking over from process {holder.pid}" in messages[0]
    assert not (tmp_path / RECORD).exists()
    with lock_save_folder(tmp_path, messages.append) as lock:
        assert lock.previous is None
    assert len(messages) == 1


def record_of_another_machine(root: Path) -> None:
    """Write the record of a run on a machine whose locks are not visible here."""
    with lock_save_folder(root, print) as lock:
        elsewhere = replace(lock.owner, host="node07", boot="another kernel", token="another")
    (root / RECORD).write_text(json.dumps(asdict(elsewhere)))


def test_heartbeat_of_another_machine_is_monitored_before_a_takeover(tmp_path):
    record_of_another_machine(tmp_path)
    messages: list[str] = []
    with lock_save_folder(tmp_path, messages.append, timeout=0.3) as lock:
        assert lock.previous is not None
        assert lock.previous.host == "node07"
    assert "waiting 0.3 s for a heartbeat" in messages[0]

    record_of_another_machine(tmp_path)
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            os.utime(tmp_path / RECORD)

    heart = threading.Thread(target=beat)
    heart.start()
    refused = r"in use by another run .process .* on node07"
    with (
        pytest.raises(UserError, match=refused),
        lock_save_folder(tmp_path, messages.append, timeout=5.0),
    ):
        pass
    end.set()
    heart.join()


def test_a_run_gives_heartbeats_until_it_releases_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    with lock_save_folder(tmp_path, print) as lock:
        for old in (0, 1):
            os.utime(tmp_path / RECORD, (old, old))
            end = time.monotonic() + TIMEOUT
            while (tmp_path / RECORD).stat().st_mtime == old:
                assert time.monotonic() < end
                time.sleep(0.005)
        assert abs(time.time() - (tmp_path / RECORD).stat().st_mtime) < TIMEOUT
    assert not lock._heartbeat_thread.is_alive()


def test_a_run_on_another_machine_lives_by_its_heartbeat(tmp_path):
    """It is dead after two minutes without one."""
    record_of_another_machine(tmp_path)
    owner = read_owner(tmp_path)
    assert owner is not None
    for age, alive in ((0.0, True), (60.0, True), (121.0, False)):
        os.utime(tmp_path / RECORD, (time.time() - age,) * 2)
        assert is_owner_alive(tmp_path, owner) == alive
        if alive:
            with pytest.raises(UserError, match=r"in use by another run .* on node07"):
                refuse_if_in_use(tmp_path)
        else:
            refuse_if_in_use(tmp_path)
    (tmp_path / RECORD).unlink()
    assert not is_owner_alive(tmp_path, owner)
    refuse_if_in_use(tmp_path)


def test_a_run_that_lost_the_lock_publishes_nothing(tmp_path):
    with lock_save_folder(tmp_path, print) as lock:
        lock.check()
        other = replace(lock.owner, token="another")
        (tmp_path / RECORD).write_text(json.dumps(asdict(other)))
        with pytest.raises(LockLostError, match="was acquired by process"):
            lock.check()
    # It belongs to the other run now.
    assert read_owner(tmp_path) == other


def test_two_runs_at_once_on_a_file_system_without_locks(tmp_path, monkeypatch):
    """The last one to write the record is the owner, also of a folder without a former owner."""
    written = []

    def another_writes(seconds: float) -> None:
        found = read_owner(tmp_path)
        assert found is not None
        other = replace(found, host="node09", boot="another kernel", token="another")
        (tmp_path / RECORD).write_text(json.dumps(asdict(other)))
        written.append(other)

    monkeypatch.setattr(filesystem, "_lock", lambda _: False)
    monkeypatch.setattr(locks.time, "sleep", another_writes)
    with (
        pytest.raises(UserError, match=r"in use by another run .* on node09"),
        lock_save_folder(tmp_path, print),
    ):
        pass
    assert written and read_owner(tmp_path) == written[0]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    refused = r"--save .*: not writable: Not a directory"
    with (
        pytest.raises(UserError, match=refused),
        lock_save_folder(tmp_path / "file" / "save", print),
    ):
        pass


RECORDED = {"host": "h", "boot": "b", "pid": 2**31 - 1, "started": "s", "token": "t"}
UNKNOWN = "process 0 on an unknown machine, since an unknown time"


@pytest.mark.parametrize(
    ("change", "owner"),
    [
        ({}, "process 2147483647 on h, since s"),
        ({"pid": 0}, "process 0 on h, since s"),
        ({"pid": 2**31}, UNKNOWN),
        ({"pid": -1}, UNKNOWN),
        ({"pid": True}, UNKNOWN),
        ({"pid": "7"}, UNKNOWN),
        ({"host": 7}, UNKNOWN),
        ({"boot": None}, UNKNOWN),
        ({"started": 7}, UNKNOWN),
        ({"token": 7}, UNKNOWN),
        ({"more": 7}, UNKNOWN),
    ],
)
def test_records(tmp_path, change, owner):
    (tmp_path / RECORD).write_text(json.dumps({**RECORDED, **change}))
    assert str(read_owner(tmp_path)) == owner


def test_damaged_record(tmp_path):
    assert read_owner(tmp_path) is None
    (tmp_path / RECORD).write_text("{")
    messages: list[str] = []
    with lock_save_folder(tmp_path, messages.append, timeout=0.2) as lock:
        assert lock.previous is not None
    assert "waiting 0.2 s" in messages[0]


def another_acquires(root: Path) -> bool:
    """Whether another process can acquire the folder."""
    program = HOLD.replace("if os.fork() == 0:", "sys.exit()\n    if os.fork() == 0:")
    command = [sys.executable, "-c", program, str(root)]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("what", ["folder", "remade", LOCK, RECORD, "damaged"])
def test_a_folder_that_is_deleted_during_the_run(tmp_path, what):
    """It is recreated and stays this run's: no other run acquired it."""
    root = tmp_path / "save"
    messages: list[str] = []
    with lock_save_folder(root, messages.append) as lock:
        if what in ("folder", "remade"):
            shutil.rmtree(root)
            if what == "remade":
                root.mkdir()
        elif what == "damaged":
            (root / RECORD).write_text("{")
        else:
            (root / what).unlink()
        lock.check()
        assert len(messages) == 1 and "was deleted or damaged during the run" in messages[0]
        lock.check()
        assert len(messages) == 1
        assert read_owner(root) == lock.owner
        assert not another_acquires(root)
    assert not (root / RECORD).exists()
    assert another_acquires(root)


def test_a_folder_that_another_run_takes_after_it_was_deleted(tmp_path):
    root = tmp_path / "save"
    with lock_save_folder(root, print) as lock:
        shutil.rmtree(root)
        command = [sys.executable, "-c", HOLD, str(root)]
        other = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            assert other.stdout is not None and other.stdout.readline() == "held False\n"
            with pytest.raises(LockLostError, match=f"was acquired by process {other.pid}"):
                lock.check()
            (root / RECORD).unlink()
            with pytest.raises(LockLostError, match="was acquired by another run"):
                lock.check()
        finally:
            os.killpg(other.pid, signal.SIGKILL)
            other.wait()


def failing(monkeypatch, code: int, times: int) -> None:
    """Make reading the record and locking fail ``times`` times each."""
    for module, name in ((locks, "_read_record"), (locks, "acquire_lock")):
        function, left = getattr(module, name), [times]

        def fail(path, *rest, function=function, left=left):
            if left[0]:
                left[0] -= 1
                raise OSError(code, os.strerror(code), str(path))
            return function(path, *rest)

        monkeypatch.setattr(module, name, fail)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_transient_errors_are_retried(tmp_path, monkeypatch, code):
    """They are not treated as another run."""
    monkeypatch.setattr(filesystem.time, "sleep", lambda _: None)
    messages: list[str] = []
    with lock_save_folder(tmp_path, messages.append) as lock:
        failing(monkeypatch, code, 2)
        lock.check()
        assert messages == [f"{tmp_path}: {os.strerror(code)}; retrying for 17 s"]
        failing(monkeypatch, code, 100)
        with pytest.raises(OSError, match=os.strerror(code)):
            lock.check()
    with (
        pytest.raises(RunError, match=f"{os.strerror(code)}.*does not respond"),
        lock_save_folder(tmp_path, messages.append),
    ):
        pass


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EACCES, "change its permissions"),
        (errno.EROFS, "Choose another folder"),
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
    ],
)
def test_errors_when_acquiring_a_folder(tmp_path, monkeypatch, code, remedy):
    failing(monkeypatch, code, 100)
    with pytest.raises(UserError) as refused, lock_save_folder(tmp_path, print):
        pass
    assert f"--save {tmp_path}: not writable: {os.strerror(code)}" in str(refused.value)
    assert remedy in str(refused.value)
