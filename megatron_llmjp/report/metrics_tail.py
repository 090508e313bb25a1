"""The latest records of a run: last steps, last validations, and how its last process ended.

Only the end of the metrics file is read, and only the lines that are needed are parsed, so that
hundreds of runs of any length are shown within a second or two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from megatron_llmjp.metric_registry import (
    EVENT,
    ITERATION,
    LM_LOSS,
    METRICS_FILE,
    SECONDS_PER_ITERATION,
    VALIDATION_LOSS,
)
from megatron_llmjp.report.history import ROUTINE_EVENTS, JsonRecord, parse_record
from megatron_llmjp.report.jobs import tail

TAIL_BYTES = 1 << 18
"""Size of the end of the metrics file that is read: some hundred records."""
LAST_STEPS = 3
"""Number of log intervals that are read."""

_STEP = f'"{LM_LOSS.name}":'
_EVENT = f'"{EVENT}":'
_VALIDATION = f'"{VALIDATION_LOSS.prefix}/'


@dataclass(frozen=True)
class RecentMetrics:
    """Records near the end of a metrics file."""

    steps: list[JsonRecord] = field(default_factory=list)
    """The last :data:`LAST_STEPS` log intervals, oldest first."""
    validation: dict[str, float] = field(default_factory=dict)
    """Last loss of each validation set."""
    end: JsonRecord | None = None
    """Event with which the last process ended; None if it runs or was killed."""
    restarted_at: int | None = None
    """Iteration that a process resumed from, if it has not logged a step yet."""
    exception: str | None = None
    """Last exceptional event, such as a bad step."""

    @property
    def last(self) -> JsonRecord:
        """The last log interval; empty without any."""
        return self.steps[-1] if self.steps else {}

    @property
    def log_interval_seconds(self) -> float | None:
        """Seconds between log lines; None if only one is known.

        The first line of a process follows its first step, not an interval.
        """
        if len(self.steps) < 2:
            return None
        iterations = [int(step[ITERATION]) for step in self.steps]
        between = max(b - a for a, b in pairwise(iterations))
        return max(1, between) * float(self.last.get(SECONDS_PER_ITERATION.name) or 0.0)


def read_recent_metrics(folder: Path) -> RecentMetrics:
    """Read the end of a run's metrics file; damaged lines are skipped."""
    steps: list[JsonRecord] = []
    events: list[JsonRecord] = []
    validation: dict[str, float] = {}
    restarted_at: int | None = None
    for line in reversed(tail(folder / METRICS_FILE, TAIL_BYTES)):
        is_step = _STEP in line and len(steps) < LAST_STEPS
        if not (is_step or _EVENT in line or _VALIDATION in line):
            continue
        record = parse_record(line)
        if record is None:
            continue
        if LM_LOSS.name in record:
            steps.insert(0, record)
        if EVENT in record:
            is_first = not steps and not any(e[EVENT] == "start" for e in events)
            if record[EVENT] == "start" and is_first:
                restarted_at = int(record[ITERATION])
            events.append(record)
        validation = {**_losses(record), **validation}
    steps = steps[-LAST_STEPS:]
    return RecentMetrics(
        steps, validation, _end(events), restarted_at, _last_exceptional_event(events)
    )


def _losses(record: JsonRecord) -> dict[str, float]:
    return {
        name: float(record[key])
        for key, name in VALIDATION_LOSS.names(record).items()
        if isinstance(record[key], int | float)
    }


def _end(events: list[JsonRecord]) -> JsonRecord | None:
    """Return the last event of a process if it is its end; ``events`` are newest first."""
    for record in events:
        if record[EVENT] in ("start", "end"):
            return record if record[EVENT] == "end" else None
    return None


def _last_exceptional_event(events: list[JsonRecord]) -> str | None:
    for record in events:
        if record[EVENT] not in (None, *ROUTINE_EVENTS):
            return f"{record[EVENT]} at iteration {record[ITERATION]}: {record.get('why', '')}"
    return None
