"""Marks of a run's plots: folds, spikes, rollbacks, restarts, failures, checkpoints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_llmjp.checkpoint import manifest
from megatron_llmjp.metric_registry import EVENT, ITERATION
from megatron_llmjp.report.history import ROUTINE_EVENTS, MetricsHistory

SPIKE_TEXT = "a spike of the gradient norm"
"""Part of the reason of a bad step that is a spike (``training/gradient_monitor.py``)."""
ROLLBACK_TEXT = "rolling back to the last checkpoint"
"""Part of the reason of a bad step that caused a rollback."""

KINDS = ("spike", "bad step", "rollback", "straggler", "event", "restart", "failure", "checkpoint")
"""Kinds of marks, in the order of the legend."""
MAX_MARKS = 500
"""Marks of one kind in a page; of more, evenly spaced ones are kept."""


@dataclass(frozen=True)
class Mark:
    """An event at an iteration."""

    kind: str
    iteration: int
    text: str = ""


def find_marks(history: MetricsHistory) -> list[Mark]:
    """Return all marks of a run: its events, restarts, and the checkpoints that exist."""
    found = [mark for event in history.events if (mark := _mark_of(event)) is not None]
    found += [Mark("restart", iteration, "") for iteration in history.restarts]
    saved = manifest.complete_iterations(history.folder)
    return [*found, *(Mark("checkpoint", iteration) for iteration in saved)]


def count_marks(marks: list[Mark]) -> dict[str, int]:
    """Return the number of marks of each kind that occurs, in the order of :data:`KINDS`."""
    counts = Counter(mark.kind for mark in marks)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def limit_marks(marks: list[Mark], most: int = MAX_MARKS) -> list[Mark]:
    """Return at most ``most`` marks of each kind, evenly spaced over those that there are."""
    limited: list[Mark] = []
    for kind in KINDS:
        of_kind = [mark for mark in marks if mark.kind == kind]
        number = min(most, len(of_kind))
        limited += (of_kind[i * len(of_kind) // number] for i in range(number))
    return limited


def _mark_of(event: dict[str, object]) -> Mark | None:
    kind, why = str(event[EVENT]), str(event.get("why") or "")
    iteration = int(str(event[ITERATION]))
    if kind == "end" and event.get("outcome") == "failed":
        return Mark("failure", iteration, why)
    if kind in ROUTINE_EVENTS:
        return None
    if kind == "bad step":
        if ROLLBACK_TEXT in why:
            return Mark("rollback", iteration, why)
        return Mark("spike" if SPIKE_TEXT in why else kind, iteration, why)
    if kind in KINDS:
        return Mark(kind, iteration, why)
    return Mark("event", iteration, f"{kind}: {why}" if why else kind)
