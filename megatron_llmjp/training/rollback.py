"""Rollbacks after spikes: which batches they skip, how many there were, and what the run lacks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.skips import Skips
from megatron_llmjp.prepare import Run
from megatron_llmjp.prepare_data import count_iterations

WINDOW = 1000
"""Iterations in which ``max_rollbacks`` are allowed."""

_WORD = "positions"


@dataclass(frozen=True)
class Rollback:
    """A request to go back to the last checkpoint and to skip the batches that led to a spike."""

    iteration: int
    positions: tuple[int, int]
    """Of the schedule, half open."""

    @property
    def words(self) -> str:
        """How a checkpoint names the skipped positions (``Past.skipped_iterations``)."""
        return f"{_WORD} {self.positions[0]}-{self.positions[1]}"


def count(run: Run) -> int:
    """Rollbacks of the run so far."""
    return len(_ranges(run))


def count_recent(run: Run, sizes: BatchSizes, iteration: int) -> int:
    """Rollbacks that skipped batches of the :data:`WINDOW` iterations before this one."""
    first = sizes.consumed_after(max(0, iteration - WINDOW))
    return sum(run.schedule.skips.kept_before(end) >= first for _, end in _ranges(run).values())


def planned_iterations(run: Run) -> int:
    """Iterations that the run would have without its rollbacks."""
    other = [r for words, r in run.past.skipped_iterations.items() if not _is_rollback(words)]
    by_user = Skips.of([*other, *(skip.samples for skip in run.folds.skip)])
    return count_iterations(run.config, run.schedule.skipping(by_user))[0]


def _ranges(run: Run) -> dict[str, tuple[int, int]]:
    """Positions that rollbacks skipped, by their words."""
    skipped = run.past.skipped_iterations
    return {words: positions for words, positions in skipped.items() if _is_rollback(words)}


def _is_rollback(words: str) -> bool:
    return words.startswith(f"{_WORD} ")
