"""One run per save folder, among real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_llmjp.checkpoint.lock import RECORD, LostLock, read_owner, taken
from megatron_llmjp.errors import UserError
from tests.support.processes import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from megatron_llmjp.checkpoint.lock import taken
with taken(Path(sys.argv[1]), print, patience=1.0) as lock:
    if os.fork() == 0:  # as a data worker, which may live on for a while
        time.sleep(60)
        os._exit(0)
    print("held", lock.left_by is not None, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ``tmp_path``."""
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
    assert owner.pid == holder.pid
    refused = f"in use by another run .process {holder.pid} on .*since"
    with pytest.raises(UserError, match=refused), taken(tmp_path, print):
        pass
    assert read_owner(tmp_path) == owner

    holder.kill()  # its forked child lives on
    holder.wait()
    told: list[str] = []
    with taken(tmp_path, told.append) as lock:
        assert lock.left_by == owner
        assert f"taking the place of process {holder.pid}" in told[0]
    assert not (tmp_path / RECORD).exists()
    with taken(tmp_path, told.append) as lock:
        assert lock.left_by is None
    assert len(told) == 1


def record_of_another_machine(root: Path) -> None:
    """As a run on a machine leaves it whose locks this machine does not see."""
    with taken(root, print) as lock:
        elsewhere = replace(lock.owner, host="node07", boot="another kernel", token="another")
    (root / RECORD).write_text(json.dumps(asdict(elsewhere)))


def test_another_machine_is_watched_before_its_place_is_taken(tmp_path):
    record_of_another_machine(tmp_path)
    told: list[str] = []
    with taken(tmp_path, told.append, patience=0.3) as lock:
        assert lock.left_by is not None
        assert lock.left_by.host == "node07"
    assert "waiting 0.3 s for a sign of life" in told[0]

    record_of_another_machine(tmp_path)
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            os.utime(tmp_path / RECORD)

    heart = threading.Thread(target=beat)
    heart.start()
    refused = r"in use by another run .process .* on node07"
    with pytest.raises(UserError, match=refused), taken(tmp_path, told.append, patience=5.0):
        pass
    end.set()
    heart.join()


def test_a_run_that_seemed_dead_publishes_nothing(tmp_path):
    with taken(tmp_path, print) as lock:
        lock.check()
        other = replace(lock.owner, token="another")
        (tmp_path / RECORD).write_text(json.dumps(asdict(other)))
        with pytest.raises(LostLock, match="was taken by process"):
            lock.check()
    # Not this run's to remove any more.
    assert read_owner(tmp_path) == other


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    refused = r"--save .*: cannot be written to: Not a directory"
    with pytest.raises(UserError, match=refused), taken(tmp_path / "file" / "save", print):
        pass


def test_damaged_record_is_no_traceback(tmp_path):
    (tmp_path / RECORD).write_text("{")
    told: list[str] = []
    with taken(tmp_path, told.append, patience=0.2) as lock:
        assert lock.left_by is not None
    assert "waiting 0.2 s" in told[0]
