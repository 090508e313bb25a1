"""Time limits: a call or command that hangs is ended, and its error says so."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_llmjp.preflight.workers import WorkerError, call_all, run_command


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number**2


def hang(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    signal.pause()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_or_raise(number: int) -> None:
    if number:
        raise RuntimeError("broken")
    time.sleep(1000)


def test_results_are_in_the_order_of_the_arguments():
    assert call_all(square, [(3,), (1,), (2,)], 1000) == [9, 1, 4]


def test_errors_of_workers():
    with pytest.raises(WorkerError, match=r"^ValueError: -2 is negative$"):
        call_all(square, [(1,), (-2,)], 1000)
    with pytest.raises(WorkerError, match="RuntimeError: broken"):
        call_all(wait_or_raise, [(0,), (1,)], 1000)
    with pytest.raises(WorkerError, match="process 0 died"):
        call_all(die, [()], 1000)


def test_a_hanging_worker_is_killed(tmp_path):
    file = tmp_path / "pid"

    def reason() -> str:
        return "the other node failed" if file.exists() and file.read_text() else ""

    with pytest.raises(WorkerError, match="the other node failed"):
        call_all(hang, [(str(file),)], 1000, reason)
    assert not psutil.pid_exists(int(file.read_text()))
    with pytest.raises(WorkerError, match="not finished after 0 s"):
        call_all(hang, [(str(file),)], 0.0)


def test_commands():
    assert run_command(["echo", "a"], 1000) == "a\n"
    with pytest.raises(RuntimeError, match="sh: broken"):
        run_command(["sh", "-c", "echo broken >&2; exit 1"], 1000)
    with pytest.raises(RuntimeError, match="sleep does not answer within 0 s"):
        run_command(["sleep", "1000"], 0.01)
    with pytest.raises(RuntimeError, match="no-such-program: No such file"):
        run_command(["no-such-program"], 1000)
