"""``run_ranks``: results, the error of the first failed rank, and the timeout."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.processes import run_ranks
from tests.support.timeouts import PROCESS_TIMEOUT

SLEEP = 10 * PROCESS_TIMEOUT


def rank_and_sum(numbers: list[int]) -> list[int]:
    print("much", "more than a pipe holds" * 10_000, sep="\n", flush=True)
    return [int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sum(numbers)]


def fail_on_rank_1(folder: str) -> None:
    leave_pid(folder)
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 failed on purpose")
    time.sleep(SLEEP)


def sleep_on_rank_0(folder: str) -> None:
    leave_pid(folder)
    if os.environ["RANK"] == "0":
        time.sleep(SLEEP)


def exit_badly() -> None:
    print("last words", file=sys.stderr, flush=True)
    os._exit(7)


def leave_pid(folder: str) -> None:
    (Path(folder) / os.environ["RANK"]).write_text(str(os.getpid()))


def test_results_of_all_ranks():
    assert run_ranks(rank_and_sum, 2, [1, 2, 3]) == [[0, 2, 6], [1, 2, 6]]


def test_the_first_error_is_shown_and_the_others_are_stopped(tmp_path):
    with pytest.raises(AssertionError, match=r"rank 1 failed(?s:.*)rank 1 failed on purpose"):
        run_ranks(fail_on_rank_1, 2, str(tmp_path))
    assert_gone(tmp_path)
    with pytest.raises(AssertionError, match="last words"):
        run_ranks(exit_badly, 1)


def test_time_out_names_the_ranks_that_wait(tmp_path):
    with pytest.raises(AssertionError, match=r"ranks \[0\] are still running after 3 s"):
        run_ranks(sleep_on_rank_0, 2, str(tmp_path), timeout=3.0)
    assert_gone(tmp_path)


def assert_gone(folder: Path) -> None:
    for path in folder.iterdir():
        pid = int(path.read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
