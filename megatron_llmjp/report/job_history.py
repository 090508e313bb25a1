"""Failures, waiting times and saves of a run's jobs so far, for the estimate of the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_llmjp.estimate.failures import ObservedJobs
from megatron_llmjp.report.jobs import LOG_BYTES, job_folders, read_job_ends, tail

NO_FAILURES = (EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR)
"""Exit codes of jobs that no machine ended."""
SEARCHED_LOGS = 5
"""Number of newest jobs whose saves are counted."""
_SAVED = re.compile(
    r"^saved checkpoint .* in ([\d.]+) s \((?:synchronous|training waited ([\d.]+))"
)


@dataclass(frozen=True)
class _End:
    """End of a start of a job."""

    job: str
    restart: int
    time: float
    """Seconds since the epoch."""
    seconds: float
    """Time that the job ran."""
    failed: bool
    requeued: bool


def observe_jobs(folder: Path) -> ObservedJobs | None:
    """Return what the jobs of a save folder show; None if no job has ended yet."""
    ends = [found for record in read_job_ends(folder) if (found := _parse(record)) is not None]
    if not ends:
        return None
    saves = list(_saves(folder))
    failures, seconds, waits = _count(ends)
    return ObservedJobs(
        failures,
        seconds,
        queue=fmean(waits) if waits else None,
        save_time=median(s for s, _ in saves) if saves else None,
        save_stall=median(s for _, s in saves) if saves else None,
    )


def _count(ends: Sequence[_End]) -> tuple[int, float, list[float]]:
    """Return the number of failures, the seconds that jobs ran, and the times in the queue."""
    failures, seconds, waits = 0, 0.0, []
    last: _End | None = None
    for end in ends:
        failures += end.failed
        seconds += end.seconds
        if last is not None and last.job == end.job and last.requeued:
            between = max(0.0, end.time - end.seconds - last.time)
            # Slurm requeues a job whose first node dies without a record of its end.
            missing = max(0, end.restart - last.restart - 1)
            failures += missing
            if missing:
                seconds += between
            else:
                waits.append(between)
        last = end
    return failures, seconds, waits


def _parse(record: Mapping[str, Any]) -> _End | None:
    """Return the end that a record describes; None for one of an earlier version, or a damaged one.

    Records of earlier versions do not contain how long the job ran.
    """
    code, seconds, restart = (record.get(name) for name in ("exit code", "seconds", "restart"))
    if type(code) is not int or not isinstance(seconds, int | float):
        return None
    try:
        time = datetime.strptime(str(record.get("time")), "%Y-%m-%d %H:%M:%S").timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    if not (math.isfinite(seconds) and seconds >= 0):
        return None
    return _End(
        job=str(record.get("job")),
        restart=restart if type(restart) is int else 0,
        time=time,
        seconds=float(seconds),
        failed=code not in NO_FAILURES,
        requeued=record.get("requeued") is True,
    )


def _saves(folder: Path) -> Iterator[tuple[float, float]]:
    """Yield the seconds until a save was complete, and those for which it blocked training."""
    for job in job_folders(folder)[:SEARCHED_LOGS]:
        for line in tail(job.path / "rank_0000.log", LOG_BYTES):
            if found := _SAVED.match(line):
                seconds = float(found[1])
                yield seconds, float(found[2]) if found[2] else seconds
