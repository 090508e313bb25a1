"""Failures, waiting times and saves, from the records and logs of a run's jobs."""

from __future__ import annotations

import json

import pytest

from megatron_llmjp.estimate.failures import ObservedJobs
from megatron_llmjp.report.job_history import observe_jobs
from slurm import requeue


def record(time: str, code: int, seconds: float | None = 3600, restart: int = 0, **more) -> str:
    found = {"time": f"2026-01-01 {time}", "job": "7", "restart": restart, "exit code": code}
    found |= {"seconds": seconds, "iteration": 1, "requeued": code != 0, "why": ""}
    return json.dumps(found | more.pop("damaged", {}) | more) + "\n"


def observe(folder, *lines: str) -> ObservedJobs | None:
    (folder / "requeues.jsonl").write_text("".join(lines))
    return observe_jobs(folder)


def test_no_history(tmp_path):
    assert observe_jobs(tmp_path) is None
    assert observe(tmp_path, record("01:00:00", 1, seconds=None), "damaged\n", "[]\n") is None


def test_failures_and_waits(tmp_path):
    """Stops on request and user errors are no failures."""
    found = observe(
        tmp_path,
        record("01:00:00", 3),
        record("02:10:00", 1, restart=1),  # after 10 minutes in the queue
        record("03:30:00", 139, restart=2),  # after 20
        record("04:00:00", 2, restart=3, seconds=1800),  # after none
        record("09:00:00", 0, job="8"),  # submitted by hand
    )
    assert found == ObservedJobs(2, 3 * 3600 + 1800 + 3600, queue=600.0)


def test_lost_jobs_are_failures(tmp_path):
    """Slurm requeued the job once without a record of its end: restart 1 is missing."""
    found = observe(tmp_path, record("01:00:00", 3), record("05:00:00", 3, restart=2))
    assert found == ObservedJobs(1, 2 * 3600 + 3 * 3600.0)


@pytest.mark.parametrize(
    "damaged",
    [
        {"time": "yesterday"}, {"time": None}, {"exit code": "1"}, {"seconds": "9"},
        {"seconds": -1}, {"seconds": float("nan")}, {"seconds": float("inf")},
    ],
)  # fmt: skip
def test_damaged_records_are_omitted(tmp_path, damaged):
    assert observe(tmp_path, record("01:00:00", 1, damaged=damaged)) is None
    assert observe(tmp_path, record("01:00:00", 1, restart="x")) == ObservedJobs(1, 3600.0)


def test_records_that_jobs_write(tmp_path):
    for code, seconds in ((1, 50), (3, 70)):
        requeue.main(["--save", str(tmp_path), "--code", str(code), "--seconds", str(seconds)])
    found = observe_jobs(tmp_path)
    assert found is not None and (found.failures, found.seconds) == (1, 120.0)


def test_saves(tmp_path):
    logs = {
        "job7_0": "saved checkpoint /s/iter_0000010 in 12.0 s (synchronous)\n",
        "job7_1": "x\nsaved checkpoint /s/iter_0000020 in 30.0 s (training waited 1.5 s)\n"
        "saved checkpoint /s/iter_0000030 in 40.0 s (training waited 2.5 s)\nsaved checkpoint",
    }
    for name, text in logs.items():
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / "rank_0000.log").write_text(text)
    found = observe(tmp_path, record("01:00:00", 3))
    assert found == ObservedJobs(0, 3600.0, save_time=30.0, save_stall=2.5)
