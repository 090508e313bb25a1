"""The first cause of a failed start of a job, from logs as Slurm and ranks write them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_llmjp import cli
from megatron_llmjp.report.first_cause import find_cause
from slurm.requeue import main as requeue_main

KILLED = """\
srun: error: n1: task 5: Killed
srun: launch/slurm: _step_signal: Terminating StepId=7.0
srun: error: n0: tasks 0-3: Exited with exit code 1
"""
LOST = """\
srun: error: Node failure on n1
srun: error: n0: tasks 0-3: Killed
"""


@pytest.fixture
def logs(tmp_path: Path):
    """Return a function that writes logs, from oldest to newest, and returns their folder."""

    def write(**texts: str) -> Path:
        for age, (name, text) in enumerate(texts.items()):
            path = tmp_path / f"{name}.log"
            path.write_text(text)
            os.utime(path, (1e9 + age, 1e9 + age))
        return tmp_path

    return write


def test_the_first_error_of_any_rank(logs):
    first = "iteration 1\nerror: rank 5 on n1: fold file a.yaml does not exist\n  use b.yaml\n"
    folder = logs(rank_0005=first, rank_0000="error: rank 0:\nTraceback\nOSError: reset\n")
    cause = find_cause(folder)
    assert cause.log == "rank_0005.log"
    assert cause.summary == "rank 5 on n1: fold file a.yaml does not exist"
    assert cause.lines == tuple(first.splitlines()[1:])


def test_a_rank_without_an_error_of_its_own(logs):
    cause = find_cause(logs(rank_0005="iteration 7\nBus error (core dumped)\n\n", srun=KILLED))
    assert cause.log == "rank_0005.log"
    assert cause.summary == "rank 5 on n1: Killed, after: Bus error (core dumped)"
    assert cause.lines == ("srun: error: n1: task 5: Killed", "iteration 7", *cause.lines[2:])


def test_a_killed_rank_breaks_the_connections_of_others(logs):
    reset = "error: rank 0 of 8:\nTraceback\nRuntimeError: Connection reset by peer\n"
    folder = logs(rank_0005="iteration 7\n", srun=KILLED, rank_0000=reset)
    assert find_cause(folder).summary == "rank 5 on n1: Killed, after: iteration 7"
    assert find_cause(logs(srun=LOST, rank_0000=reset)).summary == "Node failure on n1"
    several = KILLED.replace("task 5", "tasks 4-5,7")
    assert find_cause(logs(srun=several, rank_0000=reset)).summary == "rank 4 on n1: Killed"
    own = logs(rank_0005="error: rank 5 on n1: disk full\n", srun=KILLED, rank_0000=reset)
    assert find_cause(own).summary == "rank 5 on n1: disk full"
    code = KILLED.replace("Killed", "Exited with exit code 1")
    watchdog = logs(rank_0000="error: no progress\n", rank_0005="iteration 7\n", srun=code)
    assert find_cause(watchdog).summary == "no progress"


def test_without_logs_of_ranks(logs, tmp_path: Path):
    assert find_cause(tmp_path) is find_cause(tmp_path / "missing") is None
    message = "srun: error: Unable to create step for job 7: Invalid account\n"
    assert find_cause(logs(srun=message)).summary.endswith("step for job 7: Invalid account")
    assert find_cause(logs(srun=LOST)).summary == "Node failure on n1"


def test_the_cause_is_printed_and_recorded(logs, tmp_path: Path, capsys):
    folder = logs(rank_0003="warning: x\nerror: --lr is missing\n")
    assert requeue_main(["--save", str(tmp_path), "--code", "2", "--logs", str(folder)]) == 1
    assert "error: --lr is missing" in capsys.readouterr().out
    assert json.loads((tmp_path / "requeues.jsonl").read_text())["cause"] == "--lr is missing"
    assert requeue_main(["--save", str(tmp_path), "--code", "0", "--logs", str(folder)]) == 1
    assert "cause" not in (tmp_path / "requeues.jsonl").read_text().splitlines()[1]


def test_a_rank_with_an_error_of_its_own_prints_it(monkeypatch, capsys):
    """The other ranks wait until the first has had the time to print, and to end them."""
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MEGATRON_LLMJP_LAUNCHER", raising=False)
    assert cli.main(["--no-such-flag"]) == 2
    assert capsys.readouterr().err.startswith("error: rank 1 on ")
    assert waited == [cli.PEER_FAILURE_DELAY_SECONDS]
