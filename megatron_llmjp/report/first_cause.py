"""First cause of a failed start of a Slurm job, from the logs of its ranks and of srun.

The first error in time causes those of other ranks, which Slurm stops. A rank that was killed, or
that failed outside of this program, prints no error of its own: srun names its task.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.report.jobs import LOG_BYTES, first_error, tail

START_LOG = "start.log"
"""Log of the check before the ranks start (``slurm/choose_nodes.py``)."""
SRUN_LOG = "srun.log"
"""Messages of srun."""
SHOWN_LOGS = (START_LOG, SRUN_LOG, "rank_0000.log")
"""Logs that the log of the job contains."""
MAX_LINES = 30
"""Lines of a log that are shown."""
LAST_LINES = 3
"""Lines that are shown of a rank that printed no error."""

_FAILED_TASK = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<task>\d+)[-0-9,]*: (?P<how>.+)")
_ERROR = re.compile(r"(?:srun|slurmstepd\S*): error: ")


@dataclass(frozen=True)
class Cause:
    """The first cause of a failure."""

    log: str
    """Name of the log that contains it."""
    summary: str
    """One line."""
    lines: tuple[str, ...]
    """The lines of the log, from the error on."""


def find_cause(logs: Path) -> Cause | None:
    """Find the first cause of a failed start of a job.

    Args:
        logs: folder of the start, with ``rank_NNNN.log`` of each rank.

    Returns:
        The first error that a rank printed, by the time of its log's last line; else srun's first
        error, for a failed task with the end of its log; None without either.
    """
    written = [*logs.glob(START_LOG), *logs.glob("rank_*.log")]
    for log in sorted(written, key=lambda path: path.stat().st_mtime_ns):
        lines = tail(log, LOG_BYTES)
        message = first_error(lines)
        if message is not None:
            first = next(n for n, line in enumerate(lines) if line.startswith("error:"))
            return Cause(log.name, message, tuple(lines[first : first + MAX_LINES]))
    messages = tail(logs / SRUN_LOG, LOG_BYTES)
    return next((_cause_of(logs, line) for line in messages if _ERROR.match(line)), None)


def _cause_of(logs: Path, message: str) -> Cause:
    """Return the cause that a message of srun names: a failed task with the end of its log."""
    found = _FAILED_TASK.match(message)
    if found is None:
        return Cause(SRUN_LOG, message.partition("error: ")[2], (message,))
    log = f"rank_{int(found['task']):04d}.log"
    last = [text for text in tail(logs / log, LOG_BYTES) if text.strip()][-LAST_LINES:]
    end = f", after: {last[-1].strip()}" if last else ""
    summary = f"rank {found['task']} on {found['node']}: {found['how']}{end}"
    return Cause(log, summary, (message, *last))
