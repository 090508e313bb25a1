"""The state of a run, decided from its save folder and from Slurm's queue, and its exit code."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE
from megatron_llmjp.report.history import JsonRecord
from megatron_llmjp.report.slurm_queue import QueuedJob

State = Literal[
    "running",
    "starting",
    "stalled",
    "suspended",
    "requeued",
    "held",
    "finished",
    "stopped",
    "failed",
    "dead",
]

EXIT_CRASHED = EXIT_FAILURE
EXIT_STOPPED = EXIT_REQUEUE
"""As the exit code of a run that was stopped on request."""
EXIT_HANGING = 4

EXIT_CODES: dict[State, int] = {
    "running": EXIT_DONE,
    "starting": EXIT_DONE,
    "requeued": EXIT_DONE,
    "finished": EXIT_DONE,
    "stopped": EXIT_STOPPED,
    "held": EXIT_STOPPED,
    "suspended": EXIT_STOPPED,
    "stalled": EXIT_HANGING,
    "failed": EXIT_CRASHED,
    "dead": EXIT_CRASHED,
}
"""Exit code of ``run_status`` by state."""

_SEVERITY = (EXIT_CRASHED, EXIT_HANGING, EXIT_STOPPED, EXIT_DONE)
"""Exit codes, the one that matters most first."""

START_SECONDS = 900.0
"""Longest time between the logs of a job and its first step, where the queue is unknown."""
STALL_SECONDS = 120.0
"""A live run is stalled if it logged nothing for this long and for :data:`STALL_INTERVALS`."""
STALL_INTERVALS = 10
"""Number of log intervals."""
FIRST_STALL_SECONDS = 3600.0
"""As :data:`STALL_SECONDS`, as long as the length of a log interval is unknown."""


def worst_exit_code(states: Iterable[State]) -> int:
    """Return the exit code of the run in the worst state."""
    codes = {EXIT_CODES[state] for state in states}
    return next((code for code in _SEVERITY if code in codes), EXIT_DONE)


class StateAndReason(NamedTuple):
    """A state, and why the run is in it."""

    state: State
    why: str


@dataclass(frozen=True)
class ProcessEvidence:
    """The process that holds the save folder."""

    name: str
    is_alive: bool
    has_logged: bool
    """Whether it, and not only an earlier one, has logged a step."""
    seconds_since_log: float | None
    log_interval_seconds: float | None
    """None if unknown."""


@dataclass(frozen=True)
class JobEvidence:
    """The job of the run that decides its state."""

    job: str
    """Job id of the scheduler."""
    has_started_ranks: bool
    has_trained: bool
    """Whether it held the save folder."""
    logs_created_at: float
    """Time at which it created its last log, in seconds since the epoch."""
    queued: QueuedJob | None
    """None if the state of the queue is unknown."""
    preflight_failure: str | None
    has_ended: bool
    """Whether the end of this start of the job is recorded."""


@dataclass(frozen=True)
class Evidence:
    """Everything that decides the state of a run."""

    process: ProcessEvidence | None
    """None if the save folder was released."""
    job: JobEvidence | None
    """None for a run without job logs."""
    end: JsonRecord | None
    """Event with which the last process ended; None if it was killed."""
    job_end: Mapping[str, Any] | None
    """Last recorded end of a job."""
    all_done: bool
    """Whether all iterations are logged."""


def find_state(found: Evidence) -> StateAndReason:
    """Return the state of a run and its reason."""
    process, job = found.process, found.job
    if process is not None and process.is_alive:
        return _live(process, job)
    queued = _queued(job, found.job_end) if job is not None else None
    if queued is not None:
        return queued
    if job is not None and _is_starting(job):
        return StateAndReason("starting", f"job {job.job} has not opened the save folder yet")
    if job is not None and _failed_preflight(job):
        return StateAndReason(
            "failed", f"the preflight of job {job.job} failed: {job.preflight_failure}"
        )
    outcome = found.end.get("outcome") if found.end is not None else None
    is_done = outcome == "done" or (outcome is None and found.all_done)
    if process is None and is_done:
        return StateAndReason("finished", "all iterations are done")
    # If the newest job has not recorded its end, the last record is that of an earlier one.
    job_end = found.job_end if job is None or job.has_ended else None
    if job_end is not None:
        ended = _ended_job(job_end, job)
        if ended is not None:
            return ended
    if process is not None:
        return StateAndReason("dead", f"{process.name} was killed, or its machine is down")
    return _ended_process(found.end, job_end)


def _live(process: ProcessEvidence, job: JobEvidence | None) -> StateAndReason:
    if job is not None and job.queued is not None and job.queued.is_suspended:
        return StateAndReason("suspended", f"Slurm has suspended job {job.job}")
    silent = process.seconds_since_log
    if not process.has_logged or silent is None:
        return StateAndReason("starting", process.name)
    interval = process.log_interval_seconds
    if silent > (
        FIRST_STALL_SECONDS if interval is None else max(STALL_SECONDS, STALL_INTERVALS * interval)
    ):
        return StateAndReason("stalled", f"{process.name} is alive, but logs nothing")
    return StateAndReason("running", process.name)


def _queued(job: JobEvidence, end: Mapping[str, Any] | None) -> StateAndReason | None:
    """Return the state of a run whose job is in the queue and decides it."""
    queued = job.queued
    if queued is None or queued.is_gone:
        return None
    why = f": {end.get('why')}" if end is not None and job.has_ended else ""
    if queued.is_held:
        return StateAndReason(
            "held",
            f"job {job.job} is held in Slurm's queue ({queued.reason}); to start it: "
            f"scontrol release {job.job}",
        )
    if queued.is_pending:
        return StateAndReason("requeued", f"waiting in Slurm's queue ({queued.reason}){why}")
    if queued.is_suspended:
        return StateAndReason("suspended", f"Slurm has suspended job {job.job}")
    return None


def _is_starting(job: JobEvidence) -> bool:
    """Return whether a job is in its checks, or its ranks have not opened the save folder yet."""
    queued = job.queued
    if queued is not None and (queued.started_at or 0.0) > job.logs_created_at:
        return True  # a start without logs
    if job.has_trained or job.has_ended or _failed_preflight(job):
        return False
    if queued is None:
        return time.time() - job.logs_created_at < START_SECONDS
    return not queued.is_gone


def _failed_preflight(job: JobEvidence) -> bool:
    is_last = not job.has_started_ranks and not job.has_ended
    return is_last and job.preflight_failure is not None


def _ended_job(end: Mapping[str, Any], job: JobEvidence | None) -> StateAndReason | None:
    """Return the state of a run whose newest job has ended; None if its process says more."""
    why = str(end.get("why"))
    if end.get("requeued"):
        if job is not None and job.queued is not None and job.queued.is_gone:
            return StateAndReason("stopped", f"job {job.job} has left Slurm's queue; before: {why}")
        return StateAndReason("requeued", f"waiting in the queue: {why}")
    if end.get("exit code") in (None, EXIT_DONE, EXIT_REQUEUE):
        return None
    cause = end.get("cause")
    return StateAndReason("failed", f"{why}: {cause}" if cause else why)


def _ended_process(end: JsonRecord | None, job_end: Mapping[str, Any] | None) -> StateAndReason:
    """Return the state of a run that released its save folder."""
    if end is not None and end.get("outcome") == "failed":
        return StateAndReason("failed", str(end.get("why", "")))
    # Of a run that ends with this code, the job does not know whether it is finished.
    if job_end is not None and (end is None or job_end.get("exit code") != EXIT_DONE):
        return StateAndReason("stopped", str(job_end.get("why")))
    why = end.get("why") if end is not None else None
    return StateAndReason("stopped", str(why) if why else "the save folder was released")
