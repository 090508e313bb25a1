"""The jobs of a run, read from its save folder: logs, ends, errors, hangs, failed preflights."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.run_lock import IN_USE
from megatron_llmjp.errors import EXIT_USER_ERROR
from megatron_llmjp.preflight.result import read_result
from megatron_llmjp.report.json_lines import parse_object
from megatron_llmjp.report.slurm_queue import QueuedJob

REQUEUE_LOG = "requeues.jsonl"
"""File with one line per end of a Slurm job, written by ``slurm/requeue.py``."""
HANG_FOLDER = "hang"
"""Folder of the watchdog's files: stacks of all ranks, the report and the suspects."""
HANG_REPORT = f"{HANG_FOLDER}/report.txt"
"""Report of the watchdog on a hang (``training/watchdog.py``)."""
HANG_SUSPECTS = f"{HANG_FOLDER}/suspects.json"
"""The ranks that may have caused a hang, with their hosts."""
HANG_MESSAGE = "no progress for "
"""Start of the first error of a job that the watchdog ended."""
TRAINING_STARTED = " process(es) by "
"""Part of the summary that a job prints once it holds the save folder (``run_setup.py``)."""

ENDS_BYTES = 1 << 18
"""Size of the end of the file of job ends that is read: about a thousand of them."""
LOG_BYTES = 1 << 16
"""Size of the end of a log that is searched for an error."""
LOGS_BYTES = 1 << 22
"""Limit of the bytes read from all logs of a job."""
MIN_LOG_BYTES = 1 << 12
REPORT_BYTES = 1 << 12
SEARCHED_JOBS = 3
"""Number of newest starts of jobs that may decide the state, or are searched for an error."""
SHOWN_NODES = 4


@dataclass(frozen=True)
class Incident:
    """An error or hang of a run."""

    what: str
    where: str
    """File with details, relative to the save folder."""
    seconds_ago: float


@dataclass(frozen=True)
class JobFolder:
    """Logs of one start of a job: ``logs/jobJOB_RESTART``, or of a restart within it (``.N``)."""

    path: Path
    job: str
    """Job id of the scheduler."""
    restart: int
    modified_at: float

    def logs(self) -> list[Path]:
        """Return the logs of the ranks, sorted by name."""
        return sorted(self.path.glob("rank_*.log"))

    def has_started_ranks(self) -> bool:
        """Return whether any rank has printed something."""
        return any(_size(log) for log in self.path.glob("rank_*.log"))

    def has_trained(self) -> bool:
        """Return whether the job held the save folder, by the log of its first rank."""
        return any(TRAINING_STARTED in line for line in _head(self.path / "rank_0000.log"))


def job_folders(folder: Path) -> list[JobFolder]:
    """Return the log folders of all jobs, newest first."""
    found = []
    for path in _entries(folder / "logs"):
        match = re.fullmatch(r"job(.+)_(\d+)(?:\.\d+)?", path.name)
        if match and path.is_dir():
            found.append(JobFolder(path, match[1], int(match[2]), _modified_at(path)))
    return sorted(found, key=lambda job: (job.modified_at, job.restart), reverse=True)


def read_job_ends(folder: Path) -> list[dict[str, Any]]:
    """Return the last ends of jobs, oldest first; incomplete lines are omitted."""
    lines = tail(folder / REQUEUE_LOG, ENDS_BYTES)
    return [found for line in lines if (found := parse_object(line)) is not None]


def find_end(job: JobFolder, ends: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the last record of the end of a job's start, without restarts within the job."""
    for record in reversed(ends):
        if record.get("in this job"):
            continue
        # PBS appends the name of its server to the id.
        if (
            str(record.get("job")).partition(".")[0] == job.job
            and record.get("restart", 0) == job.restart
        ):
            return record
    return None


def excluded_nodes(ends: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the nodes that the run excluded and the last reason for each."""
    found: dict[str, str] = {}
    for record in ends:
        nodes = record.get("excluded")
        for entry in nodes if isinstance(nodes, list) else []:
            if isinstance(entry, dict) and entry.get("node"):
                found[str(entry["node"])] = str(entry.get("reason") or "")
    return found


def format_excluded(nodes: Mapping[str, str]) -> str:
    """Format excluded nodes with their reasons."""
    return "; ".join(f"{node}: {reason or 'unknown'}" for node, reason in nodes.items())


def without_rejected(ends: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ends without those of jobs that were rejected: another one held the folder.

    So does, as far as is known, a requeued Slurm job. A PBS job continues as another one.
    """
    kept: list[dict[str, Any]] = []
    for record in ends:
        is_other = bool(kept) and record.get("job") != kept[-1].get("job")
        waits = is_other and kept[-1].get("requeued") and str(record.get("job")).isdecimal()
        if _is_user_error(record) and (waits or IN_USE in str(record.get("cause"))):
            continue
        kept.append(record)
    return kept


def deciding_job(
    jobs: Sequence[JobFolder],
    ends: Sequence[dict[str, Any]],
    queue: Mapping[str, QueuedJob],
) -> JobFolder | None:
    """Return the job that decides the state of a run; None without jobs.

    It is the newest one that is in the queue and has no user error, else the newest one that was
    not rejected.

    Args:
        jobs: the jobs of the run, newest first; :data:`SEARCHED_JOBS` of them are considered.
        ends: recorded ends of jobs.
        queue: jobs in Slurm's queue, as far as is known.
    """
    newest = jobs[:SEARCHED_JOBS]
    for job in newest:
        queued = queue.get(job.job)
        end = find_end(job, ends)
        ends_now = end is not None and _is_user_error(end)
        if queued is not None and not queued.is_gone and not ends_now:
            return job
    kept = {id(record) for record in without_rejected(ends)}
    for job in newest:
        end = find_end(job, ends)
        if end is None or id(end) in kept:
            return job
    return newest[0] if newest else None


def _is_user_error(record: Mapping[str, Any]) -> bool:
    return record.get("exit code") == EXIT_USER_ERROR


def find_errors(
    folder: Path, jobs: Sequence[JobFolder], ends: Sequence[Mapping[str, Any]]
) -> tuple[Incident | None, Incident | None]:
    """Return the run's last error, and that of a job that was rejected before it held the folder.

    The first error of a job causes those of other ranks.

    Args:
        folder: the save folder.
        jobs: its jobs, newest first; :data:`SEARCHED_JOBS` of them are searched.
        ends: recorded ends of jobs.
    """
    found: dict[bool, Incident] = {}
    for job in jobs[:SEARCHED_JOBS]:
        end = find_end(job, ends)
        error = _error_of(folder, job, end)
        if error is not None:
            found.setdefault(_was_rejected(job, error.what, end), error)
        if False in found:
            break
    return found.get(False), found.get(True)


def _error_of(folder: Path, job: JobFolder, end: Mapping[str, Any] | None) -> Incident | None:
    if end is not None and isinstance(end.get("cause"), str) and end["cause"]:
        where = str(job.path.relative_to(folder))
        return Incident(end["cause"], where, time.time() - job.modified_at)
    logs = job.logs()
    size = max(MIN_LOG_BYTES, min(LOG_BYTES, LOGS_BYTES // max(1, len(logs))))
    for log in sorted(logs, key=_modified_at):
        message = first_error(tail(log, size))
        if message is not None:
            where = str(log.relative_to(folder))
            return Incident(message, where, time.time() - _modified_at(log))
    return None


def _was_rejected(job: JobFolder, error: str, end: Mapping[str, Any] | None) -> bool:
    """Return whether a job ended with a user error before it held the save folder."""
    if IN_USE in error:
        return True
    return end is not None and _is_user_error(end) and not job.has_trained()


def first_error(lines: list[str]) -> str | None:
    """Return the first line that starts with ``error:``, and the last line of its traceback."""
    for number, line in enumerate(lines):
        if not line.startswith("error:"):
            continue
        rest = lines[number + 1 :]
        if not rest or not rest[0].startswith("Traceback"):
            return line.removeprefix("error:").strip()
        cause = next((text for text in rest[1:] if text and not text.startswith(" ")), "")
        return f"{line.removeprefix('error:').strip()} {cause}"
    return None


def last_hang(folder: Path) -> Incident | None:
    """Return the watchdog's message on the last hang, with the rank to check first."""
    report = folder / HANG_REPORT
    lines = _head(report, REPORT_BYTES)
    if not lines:
        return None
    message = "; ".join(line.removeprefix("error:").strip() for line in lines[:2])
    return Incident(message, HANG_REPORT, time.time() - _modified_at(report))


def preflight_failure(job: JobFolder) -> str | None:
    """Return why the preflight of a job failed: common causes, unfit nodes; None if it did not."""
    result = read_result(job.path)
    texts = [f"{node}: {', '.join(why)}" for node, why in islice(result.unfit.items(), SHOWN_NODES)]
    hidden = len(result.unfit) - len(texts)
    more = [f"{hidden} more"] if hidden else []
    return "; ".join([*result.common, *texts, *more]) or None


def tail(path: Path, size: int) -> list[str]:
    """Return the complete lines in the last ``size`` bytes; the last line may be incomplete."""
    try:
        with path.open("rb") as stream:
            end = stream.seek(0, 2)
            stream.seek(max(0, end - size))
            text = stream.read(size).decode(errors="replace")
    except OSError:
        return []
    return _lines(text)[1 if end > size else 0 :]


def _head(path: Path, size: int = LOG_BYTES) -> list[str]:
    """Return the lines in the first ``size`` bytes."""
    try:
        with path.open("rb") as stream:
            return _lines(stream.read(size).decode(errors="replace"))
    except OSError:
        return []


def _lines(text: str) -> list[str]:
    """Split a text at line ends only: str.splitlines() also splits JSON at U+2028 in a name."""
    lines = re.split(r"\r\n|[\r\n]", text)
    return lines if lines[-1] else lines[:-1]


def _entries(folder: Path) -> list[Path]:
    try:
        return list(islice(folder.iterdir(), 100_000))
    except OSError:
        return []


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed in the meantime
        return -math.inf


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
