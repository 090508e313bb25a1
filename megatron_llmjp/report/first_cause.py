"""First cause of a failed start of a Slurm job, from the logs of its ranks and of srun.

The first error in time causes those of other ranks, which Slurm stops. A rank that was killed, or
that failed outside of this program, prints no error of its own: srun names its task, before other
ranks, whose connections to it break, print theirs.
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

_FAILED_TASK = re.compile(
    r"srun: error: (?P<node>\S+): tasks? (?P<tasks>(?P<task>\d+)[-0-9,]*): (?P<how>.+)"
)
_EXIT_CODE = "Exited with exit code"
_LOST_NODE = re.compile(r"srun: error: Node failure on ")
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
        The end of the log of the first failed task, if a signal killed it or its node was lost;
        else the first error that a rank printed, by the time of its log's last line; else srun's
        first error; None without any.
    """
    messages = tail(logs / SRUN_LOG, LOG_BYTES)
    # Ranks whose connections break end before Slurm notices that a node is lost.
    lost = next(filter(_LOST_NODE.match, messages), None)
    first = lost or next(filter(_FAILED_TASK.match, messages), None)
    if first is not None and _left_no_error(logs, first):
        return _cause_of(logs, first)
    written = [*logs.glob(START_LOG), *logs.glob("rank_*.log")]
    for log in sorted(written, key=lambda path: path.stat().st_mtime_ns):
        lines = tail(log, LOG_BYTES)
        message = first_error(lines)
        if message is not None:
            start = next(n for n, line in enumerate(lines) if line.startswith("error:"))
            return Cause(log.name, message, tuple(lines[start : start + MAX_LINES]))
    return next((_cause_of(logs, line) for line in messages if _ERROR.match(line)), None)


def _left_no_error(logs: Path, message: str) -> bool:
    """Return whether a message of srun is about a lost node, or killed tasks without an error."""
    found = _FAILED_TASK.match(message)
    if found is None:
        return True
    if found["how"].startswith(_EXIT_CODE):
        return False
    tasks: list[int] = []
    for part in found["tasks"].split(","):
        ends = [int(end) for end in part.split("-") if end]
        tasks += range(ends[0], ends[-1] + 1) if ends else ()
    return all(first_error(tail(_log_of(logs, task), LOG_BYTES)) is None for task in tasks)


def _log_of(logs: Path, task: int) -> Path:
    return logs / f"rank_{task:04d}.log"


def _cause_of(logs: Path, message: str) -> Cause:
    """Return the cause that a message of srun names: a failed task with the end of its log."""
    found = _FAILED_TASK.match(message)
    if found is None:
        return Cause(SRUN_LOG, message.partition("error: ")[2], (message,))
    log = _log_of(logs, int(found["task"]))
    last = [text for text in tail(log, LOG_BYTES) if text.strip()][-LAST_LINES:]
    end = f", after: {last[-1].strip()}" if last else ""
    summary = f"rank {found['task']} on {found['node']}: {found['how']}{end}"
    return Cause(log.name, summary, (message, *last))
