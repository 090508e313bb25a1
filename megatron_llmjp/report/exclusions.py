"""The nodes that jobs of a run excluded, with their reasons, from its save folder."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.report.jobs import tail
from megatron_llmjp.report.json_lines import parse_object

EXCLUSION_LOG = "exclusions.jsonl"
"""File with one line per node that a job excluded, written by ``slurm/requeue.py``."""
_LOG_BYTES = 1 << 18
"""Size of the end of this file that is read: about a thousand exclusions."""


@dataclass(frozen=True)
class Exclusion:
    """A node that a job excluded, and why."""

    node: str
    reason: str
    kind: str
    """Evidence: lost, silent, drained, hang, hardware, slow or preflight."""
    time: float
    """Seconds since the epoch."""
    job: str = ""
    iteration: int = 0
    """Iteration at which the run hung, or of its newest checkpoint."""


def read_exclusions(folder: Path) -> list[Exclusion]:
    """Return the nodes that jobs excluded, oldest first; damaged lines are omitted."""
    found = []
    for line in tail(folder / EXCLUSION_LOG, _LOG_BYTES):
        record = parse_object(line) or {}
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            found.append(
                Exclusion(
                    str(record["node"]),
                    str(record["reason"]),
                    str(record.get("kind", "")),
                    float(record["time"]),
                    str(record.get("job") or ""),
                    int(record.get("iteration") or 0),
                )
            )
    return found
