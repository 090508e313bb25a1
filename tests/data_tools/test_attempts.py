"""Batches of iterations that rollbacks repeated with other samples, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from data_tools.lineage.attempts import choose_attempt, describe_attempts, find_attempts
from megatron_llmjp.data.folds.schedule import Schedule, SkippedSamples
from megatron_llmjp.errors import UserError


def run_with(skipped: dict[str, tuple[int, int]], fold_file: tuple[tuple[int, int], ...] = ()):
    """A run of 10 samples per iteration, with skips in the order in which they happened."""
    skips = SkippedSamples.of([*fold_file, *skipped.values()])
    return SimpleNamespace(
        manifest=SimpleNamespace(skipped_iterations=skipped),
        schedule=Schedule(1, 8, (), skips),
        skips_of_fold_file=fold_file,
        samples_of=lambda iteration: range(10 * iteration - 10, 10 * iteration),
    )


def positions(attempt, iteration):
    numbers = range(10 * iteration - 10, 10 * iteration)
    return [attempt.schedule.position(n) for n in numbers]


def test_two_rollbacks_at_one_iteration():
    """The batches of iterations 4 and 5 are skipped, then those that replaced them."""
    run = run_with({"positions 35-55": (35, 55), "positions 55-75": (55, 75)}, ((5, 10),))
    assert [positions(a, 4)[0] for a in find_attempts(run, 4)] == [35, 55, 75]
    assert [positions(a, 5)[0] for a in find_attempts(run, 5)] == [45, 65, 85]
    (only,) = find_attempts(run, 3)
    assert positions(only, 3) == [*range(25, 35)]
    lines = describe_attempts(find_attempts(run, 5))
    assert lines == [
        "attempt 1: its samples were skipped later by a rollback (positions 35-55)",
        "attempt 2: its samples were skipped later by a rollback (positions 55-75)",
    ]
    attempts = find_attempts(run, 5)
    assert choose_attempt(attempts, 2, 5) is attempts[1]
    assert choose_attempt(attempts, None, 5) is attempts[2]
    with pytest.raises(UserError, match="--attempt 4: iteration 5 has attempts 1 to 3"):
        choose_attempt(attempts, 4, 5)


def test_iterations_after_the_skipped_ones_move():
    """Iteration 6 of the first attempt was not trained: the rollback was at iteration 5."""
    run = run_with({"positions 30-50": (30, 50)})
    assert [positions(a, 5)[0] for a in find_attempts(run, 5)] == [40, 60]
    assert [positions(a, 6)[0] for a in find_attempts(run, 6)] == [70]
