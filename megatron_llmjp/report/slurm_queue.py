"""The jobs of runs in Slurm's queue, where ``squeue`` is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

SQUEUE_SECONDS = 10.0
"""Longest wait for Slurm's answer."""

_HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT")
_PENDING = ("PENDING", "REQUEUED", "REQUEUE_FED")
_SUSPENDED = ("SUSPENDED", "STOPPED")


@dataclass(frozen=True)
class QueuedJob:
    """State of a job in Slurm's queue."""

    state: str
    """Slurm's name of the state, such as ``PENDING``; empty for a job that is not in the queue."""
    reason: str = ""
    """Slurm's reason why the job waits, such as ``Priority``."""
    started_at: float | None = None
    """Start of a job that has been started, in seconds since the epoch; None if unknown."""

    @property
    def is_held(self) -> bool:
        """Whether the job waits until somebody releases it."""
        waits = self.state in _PENDING
        return self.state in _HELD or (waits and "held" in self.reason.lower())

    @property
    def is_pending(self) -> bool:
        """Whether the job waits to be started again by Slurm."""
        return self.state in _PENDING and not self.is_held

    @property
    def is_suspended(self) -> bool:
        """Whether Slurm has stopped the job's processes."""
        return self.state in _SUSPENDED

    @property
    def is_gone(self) -> bool:
        """Whether the job is not in the queue."""
        return not self.state


def read_queue(jobs: Collection[str]) -> dict[str, QueuedJob]:
    """Return the jobs by id, in one request; empty without Slurm or without its answer."""
    known = sorted({job for job in jobs if job.isdecimal()})
    if not known or shutil.which("squeue") is None:
        return {}
    # With a single id that has left the queue, squeue fails; with several, it omits it.
    listed = ",".join([*known, known[0]])
    command = ["squeue", "--noheader", "--format=%A|%T|%r|%S", f"--jobs={listed}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode and "Invalid job id" not in done.stderr:
        return {}
    found = {job: QueuedJob("") for job in known}
    for line in done.stdout.splitlines():
        job, _, rest = line.strip().partition("|")
        state, _, rest = rest.partition("|")
        reason, _, start = rest.partition("|")
        if job in found:
            found[job] = QueuedJob(state, reason, _seconds(start))
    return found


def _seconds(text: str) -> float | None:
    """Parse Slurm's format of a local time; None if it is not one, as ``N/A``."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
