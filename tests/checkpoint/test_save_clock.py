"""Saves that are due by time, in a run whose steps take any time."""

from __future__ import annotations

import itertools
from collections import deque

import pytest

from megatron_llmjp.checkpoint.retention import SaveKind
from megatron_llmjp.checkpoint.save_clock import SaveClock
from megatron_llmjp.config.schema import CheckpointConfig


def save_times(steps, **fields) -> list[float]:
    """Return the times in minutes of the saves of a run, given the minutes of its steps.

    As in training: what the clock says after a step is read after the next step's chance to save.
    """
    time = [0.0]
    clock = SaveClock(CheckpointConfig(save="x", **fields), lambda: time[0] * 60)
    votes, found, due = deque([SaveKind.NONE]), [], SaveKind.NONE
    for minutes in steps:
        time[0] += minutes
        clock.step()
        if due:
            found.append(time[0])
            clock.restart()
            due, votes = SaveKind.NONE, deque([SaveKind.NONE])
        due = max(due, votes.popleft())
        votes.append(clock.due())
    return found


@pytest.mark.parametrize("minutes", [0.01, 0.5, 0.72, 1.0, 7.0, 19.0])
def test_at_least_hourly(minutes):
    """Also in the 172b run, whose step takes 0.72 minutes: 10 of them between two log lines."""
    times = [0.0, *save_times([minutes] * int(300 / minutes))]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(gaps) >= 4
    assert all(60 - 2 * minutes <= gap <= 60 for gap in gaps), gaps


def test_slow_steps_are_expected_again():
    """A validation of ten minutes every few steps; a first step that compiles for half an hour."""
    steps = [30.0, *[1.0, 1.0, 1.0, 11.0] * 40]
    gaps = [b - a for a, b in itertools.pairwise([0.0, *save_times(steps)])]
    assert all(20 < gap <= 60 for gap in gaps), gaps


def test_other_times():
    assert save_times([1.0] * 30, save_interval_minutes=10) == [9.0, 18.0, 27.0]
    assert save_times([1.0] * 500, non_persistent_save_minutes=0) == []


def test_kinds():
    def due(minutes: float, **fields) -> SaveKind:
        time = [0.0]
        clock = SaveClock(CheckpointConfig(save="x", **fields), lambda: time[0] * 60)
        time[0] = minutes
        return clock.due()

    assert due(59.9) is SaveKind.NONE and due(60) is SaveKind.NON_PERSISTENT
    assert due(30, save_interval_minutes=30) is SaveKind.PERSISTENT
