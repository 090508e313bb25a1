"""Batches of an iteration that was repeated with other samples.

A rollback resumes from a checkpoint with the batches of a loss spike skipped, and so does
``--skip-iterations``: the iterations after the checkpoint are then trained with other samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_tools.run_history import RecordedRun
from megatron_llmjp.data.folds.schedule import Schedule, SkippedSamples
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class Attempt:
    """One batch of an iteration.

    Attributes:
        schedule: the schedule with the samples that were skipped at the time.
        skipped_by: why its samples were skipped later; empty for the last attempt.
    """

    schedule: Schedule
    skipped_by: str = ""


def find_attempts(run: RecordedRun, iteration: int) -> list[Attempt]:
    """Return the batches of an iteration that differ, oldest first.

    The last one is that of the run as recorded. The others contain samples that were skipped later.
    """
    numbers = run.samples_of(iteration)
    skips = SkippedSamples.of(run.skips_of_fold_file)
    found = []
    for reason, (first, end) in run.manifest.skipped_iterations.items():
        schedule = run.schedule.with_skips(skips)
        if any(first <= schedule.position(number) < end for number in numbers):
            found.append(Attempt(schedule, reason))
        skips = skips.union([(first, end)])
    return [*found, Attempt(run.schedule)]


def choose_attempt(attempts: list[Attempt], number: int | None, iteration: int) -> Attempt:
    """Return an attempt by its number from 1; the last one by default.

    Raises:
        UserError: there is no such attempt.
    """
    if number is None:
        return attempts[-1]
    if not 1 <= number <= len(attempts):
        raise UserError(
            f"--attempt {number}: iteration {iteration:,} has attempts 1 to {len(attempts)}"
        )
    return attempts[number - 1]


def describe_attempts(attempts: list[Attempt]) -> list[str]:
    """Return a line on each attempt whose samples were skipped later."""
    return [
        f"attempt {number}: its samples were skipped later by "
        + (
            f"--skip-iterations {attempt.skipped_by}"
            if attempt.skipped_by[:1].isdigit()
            else f"a rollback ({attempt.skipped_by})"
        )
        for number, attempt in enumerate(attempts[:-1], 1)
    ]
