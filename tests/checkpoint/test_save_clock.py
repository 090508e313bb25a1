"""Saves that are due by time, in a run whose steps take any time."""

from __future__ import annotations

import itertools
from collections import deque

import pytest

from megatron_llmjp.checkpoint.retention import SaveKind
from megatron_llmjp.checkpoint.save_clock import SaveClock
from megatron_llmjp.config.schema import CheckpointConfig


def saves(steps, save_minutes=0.0, **fields) -> list[tuple[float, SaveKind]]:
    """Return the saves of a run, and the minutes of training before each of them.

    As in training: what the clock says after a step is read after the next step's chance to save.

    Args:
        steps: the minutes of each step.
        save_minutes: the minutes for which a save blocks training.
        fields: the save policy.
    """
    time = [0.0]
    clock = SaveClock(CheckpointConfig(save="x", **fields), lambda: time[0] * 60)
    votes, found, due, trained = deque([SaveKind.NONE]), [], SaveKind.NONE, 0.0
    for minutes in steps:
        time[0] += minutes
        trained += minutes
        clock.step()
        if due:
            found.append((trained, due))
            time[0] += save_minutes
            clock.restart(due)
            due, votes = SaveKind.NONE, deque([SaveKind.NONE])
        due = max(due, votes.popleft())
        votes.append(clock.due())
    return found


def save_times(steps, save_minutes=0.0, **fields) -> list[float]:
    """Return the minutes of training before each save of a run."""
    return [time for time, _ in saves(steps, save_minutes, **fields)]


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


def test_a_slow_save_does_not_cause_the_next_one():
    """Also on a file system that takes half an hour or two hours for a checkpoint of the 172b."""
    for save_minutes in (0.5, 30, 120):
        times = [0.0, *save_times([0.72] * 500, save_minutes)]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert len(gaps) == 6 and all(58 < gap <= 60 for gap in gaps), gaps


def test_a_slow_step_causes_one_save():
    """A validation of two hours after 100 minutes."""
    times = save_times([1.0] * 100 + [120.0] + [1.0] * 100)
    assert times == [59.0, 222.0, 281.0]


def test_hourly_saves_do_not_delay_those_that_are_kept():
    found = saves([1.0] * 300, save_interval_minutes=90)
    kept = [0.0, *(time for time, kind in found if kind is SaveKind.PERSISTENT)]
    assert [b - a for a, b in itertools.pairwise(kept)] == [89.0] * 3
    times = [0.0, *(time for time, _ in found)]
    assert all(b - a < 60 for a, b in itertools.pairwise(times)) and len(times) == 1 + 6


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
