"""Progress of a job or of all parts of an array: one line, a table, JSON and an exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_tools.preprocess.array.parts import PartState, State
from data_tools.preprocess.job.status import Amount
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE
from megatron_llmjp.formatting import format_bytes, format_count, format_duration, format_table

EXIT_STALLED = 4
EXIT_CODES: dict[State, int] = {
    "running": EXIT_DONE,
    "complete": EXIT_DONE,
    "failed": EXIT_FAILURE,
    "dead": EXIT_FAILURE,
    "stopped": EXIT_REQUEUE,
    "waiting": EXIT_REQUEUE,
    "stalled": EXIT_STALLED,
}
"""Exit code of ``preprocess_data --status`` by state."""
_WORST_FIRST: tuple[State, ...] = (
    "failed",
    "dead",
    "stalled",
    "running",
    "stopped",
    "waiting",
    "complete",
)


@dataclass(frozen=True)
class Progress:
    """Progress of all parts together.

    Attributes:
        state: the state that decides the exit code: the first of failed, dead, stalled, running,
            stopped, waiting, complete that a part is in.
        states: number of parts by state.
        done: work done.
        rates: work per second, of the parts that are running.
        total: bytes of the input on disk; None if unknown.
        seconds_left: at these rates; None if unknown.
    """

    state: State
    states: dict[State, int]
    done: Amount
    rates: Amount
    total: int | None
    seconds_left: float | None

    @property
    def share(self) -> float | None:
        """Share of the input that is done; None if unknown."""
        return min(self.done.disk / self.total, 1.0) if self.total else None


def add_up(parts: Sequence[PartState]) -> Progress:
    """Return the progress of some parts, or of one job."""
    done, rates = Amount(), Amount()
    for part in parts:
        done, rates = done + part.done, rates + part.rates
    counts = Counter(part.state for part in parts)
    total = _total(parts)
    left = None
    if counts["complete"] == len(parts):
        left = 0.0
    elif total is not None and rates.disk:
        left = max(total - done.disk, 0) / rates.disk
    worst = next(state for state in _WORST_FIRST if counts[state])
    states = {state: counts[state] for state in reversed(_WORST_FIRST) if counts[state]}
    return Progress(worst, states, done, rates, total, left)


def _total(parts: Sequence[PartState]) -> int | None:
    """Return the bytes of the input of all parts; a part that runs or ran knows it."""
    totals = [part.total for part in parts]
    if None not in totals:
        return sum(total for total in totals if total is not None)
    known = [part.array_total for part in parts if part.array_total]
    return max(known) if known and len(parts) > 1 else None


def format_line(progress: Progress, of: int) -> str:
    """Return one line: MB/s, documents/s, tokens so far and remaining time of all parts."""
    states = ", ".join(f"{count:,} {state}" for state, count in progress.states.items())
    rates = progress.rates
    items = [f"{rates.text / 1e6:,.2f} MB/s", f"{rates.documents:,.0f} docs/s"]
    items.append(f"{format_count(progress.done.tokens)} tokens so far")
    if progress.share is not None:
        items.append(f"{progress.share:.1%}")
    if progress.state == "complete":
        items = items[2:3]
    elif progress.seconds_left is not None:
        items.append(f"{format_duration(progress.seconds_left)} left")
    head = f"all {of:,} parts ({states})" if of > 1 else states.removeprefix("1 ")
    return f"{head}: {', '.join(items)}"


def format_parts(parts: Iterable[PartState]) -> str:
    """Return a table of parts, one per line, with the reasons of states that need attention."""
    rows = [["part", "state", "done", "input", "documents", "tokens", "MB/s", "rejected"]]
    notes = []
    for part in parts:
        share = f"{min(part.done.disk / part.total, 1):.1%}" if part.total else ""
        rows.append(
            [
                str(part.number),
                part.state,
                share,
                format_bytes(part.total) if part.total is not None else "",
                f"{part.done.documents:,.0f}",
                format_count(part.done.tokens),
                f"{part.rates.text / 1e6:,.2f}" if part.rates.text else "",
                f"{part.rejected:,}",
            ]
        )
        if part.state in ("failed", "dead", "stalled", "stopped", "running"):
            notes.append(f"part {part.number} {part.state}: {part.why}")
    return "\n".join([format_table(rows, right=(0, 2, 3, 4, 5, 6, 7)), *notes])


def progress_json(progress: Progress, parts: Sequence[PartState]) -> dict[str, Any]:
    """Return everything as plain values: amounts in bytes, rates per second, times in seconds."""
    return {
        "state": progress.state,
        "exit_code": EXIT_CODES[progress.state],
        "states": progress.states,
        "done": asdict(progress.done),
        "per_second": asdict(progress.rates),
        "total_bytes": progress.total,
        "share": progress.share,
        "seconds_left": progress.seconds_left,
        "parts": [_part_json(part) for part in parts],
    }


def _part_json(part: PartState) -> dict[str, Any]:
    files, finished = part.files or (None, None)
    return {
        "number": part.number,
        "state": part.state,
        "why": part.why,
        "done": asdict(part.done),
        "per_second": asdict(part.rates),
        "total_bytes": part.total,
        "files": files,
        "finished_files": finished,
        "rejected": part.rejected,
        "seconds_since_sign_of_life": part.sign_of_life,
    }
