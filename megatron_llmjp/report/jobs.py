"""Ends, errors and hangs of a run's jobs, read from its save folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.report.json_lines import parse_object

REQUEUE_LOG = "requeues.jsonl"
"""File with one line per end of a Slurm job, written by ``slurm/requeue.py``."""
HANG_REPORT = "hang/report.txt"
"""Report of the watchdog on a hang (``training/watchdog.py``)."""
TAIL_BYTES = 1 << 16
"""Size of the end of a log that is searched for an error."""


@dataclass(frozen=True)
class Incident:
    """An error or hang of a run."""

    what: str
    where: str
    """File with details, relative to the save folder."""
    seconds_ago: float


def read_job_ends(folder: Path) -> list[dict[str, Any]]:
    """Return all ends of jobs, oldest first; incomplete lines are omitted."""
    return [
        found for line in _lines(folder / REQUEUE_LOG) if (found := parse_object(line)) is not None
    ]


def last_error(folder: Path) -> Incident | None:
    """Return the first error of the newest job with errors; it causes those of other ranks."""
    jobs = [job for job in folder.glob("logs/job*") if job.is_dir()]
    for job in sorted(jobs, key=_modified_at, reverse=True):
        for log in sorted(job.glob("rank_*.log"), key=_modified_at):
            message = first_error(tail(log, TAIL_BYTES))
            if message is not None:
                return Incident(
                    message, str(log.relative_to(folder)), time.time() - _modified_at(log)
                )
    return None


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
    lines = _lines(report)
    if not lines:
        return None
    message = "; ".join(line.removeprefix("error:").strip() for line in lines[:2])
    return Incident(message, HANG_REPORT, time.time() - _modified_at(report))


def tail(path: Path, size: int) -> list[str]:
    """Return the complete lines in the last ``size`` bytes; the last line may be incomplete."""
    try:
        with path.open("rb") as stream:
            end = stream.seek(0, 2)
            stream.seek(max(0, end - size))
            text = stream.read(size).decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[1 if end > size else 0 :]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed in the meantime
        return 0.0
