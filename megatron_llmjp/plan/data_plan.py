"""The run's data on paper: what is trained on when, in which amount, at which learning rate.

Pure arithmetic over the schedule: no torch, no tokenizer, no model. The learning rate is a function
that the caller passes in. ``data_warnings.py`` says what looks wrong, ``data_table.py`` prints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.folds import FoldPlan, Schedule

LearningRate = Callable[[int], float]
"""Iteration (from 1) -> the learning rate that it applies."""


@dataclass(frozen=True)
class DatasetRow:
    """What one fold takes of one dataset."""

    name: str
    path: str
    samples: int
    tokens: int
    share: float
    """Of the fold's samples, 0 to 1."""
    epochs: float
    epochs_so_far: float
    """Of this dataset up to the end of this fold, earlier folds included."""


@dataclass(frozen=True)
class FoldRow:
    """One fold: its amounts and its place in the run."""

    name: str
    order: str
    samples: int
    """Samples of the schedule; those that are skipped are among them."""
    tokens: int
    skipped: int
    iterations: int
    """Iterations that train on the fold; one over the edge of two folds counts in both."""
    first_iteration: int | None
    """None where the run ends before the fold begins."""
    last_iteration: int | None
    first_learning_rate: float | None
    last_learning_rate: float | None
    datasets: tuple[DatasetRow, ...]


@dataclass(frozen=True)
class SkipRow:
    """One range of positions that is not trained on."""

    first: int
    end: int
    fold: str
    """The fold of its first sample."""
    before_iteration: int
    """The iteration that goes on behind it."""


@dataclass(frozen=True)
class DataPlan:
    """The whole table."""

    sequence_length: int
    batch_sizes: tuple[int, ...]
    """Every global batch size of the run, ascending."""
    folds: tuple[FoldRow, ...]
    skips: tuple[SkipRow, ...]
    train_iters: int
    samples: int
    """Samples that are trained on."""
    tokens: int
    left_out: int
    """Samples of the schedule behind the run's last iteration."""

    def tokens_by_dataset(self) -> dict[str, int]:
        """Tokens of each dataset in all folds, by path."""
        found: dict[str, int] = {}
        for fold in self.folds:
            for row in fold.datasets:
                found[row.path] = found.get(row.path, 0) + row.tokens
        return found


def make_plan(
    schedule: Schedule,
    sizes: BatchSizes,
    train_iters: int | None = None,
    learning_rate: LearningRate | None = None,
) -> DataPlan:
    """Work out the table.

    Args:
        schedule: the resolved folds.
        sizes: the run's global batch sizes.
        train_iters: where the run ends; at the end of the folds when not given.
        learning_rate: what each iteration applies; left out of the table when not given.
    """
    if train_iters is None:
        train_iters = sizes.iterations(schedule.total_samples)[0]
    used = sizes.consumed_after(train_iters)
    drawn: Counter[str] = Counter()
    rows = []
    for fold in schedule.folds:
        datasets = _datasets(fold, schedule.sequence_length, drawn)
        rows.append(_fold(fold, datasets, schedule, sizes, train_iters, learning_rate))
    skips = [
        SkipRow(
            first=first,
            end=end,
            fold=schedule.fold_of(first).name,
            before_iteration=sizes.iteration_of(schedule.skips.kept_before(end)),
        )
        for first, end in schedule.skips.ranges
    ]
    return DataPlan(
        sequence_length=schedule.sequence_length,
        batch_sizes=tuple(sizes.sizes()),
        folds=tuple(rows),
        skips=tuple(skips),
        train_iters=train_iters,
        samples=used,
        tokens=used * schedule.sequence_length,
        left_out=schedule.total_samples - used,
    )


def _fold(
    fold: FoldPlan,
    datasets: tuple[DatasetRow, ...],
    schedule: Schedule,
    sizes: BatchSizes,
    train_iters: int,
    learning_rate: LearningRate | None,
) -> FoldRow:
    begin, end = schedule.trainable(fold)
    first = sizes.iteration_of(begin)
    last = min(sizes.iteration_of(max(begin, end - 1)), train_iters)
    reached = first <= train_iters and end > begin
    rates = (learning_rate(first), learning_rate(last)) if learning_rate and reached else None
    return FoldRow(
        name=fold.name,
        order=fold.order,
        samples=fold.samples,
        tokens=fold.samples * schedule.sequence_length,
        skipped=fold.samples - (end - begin),
        iterations=last - first + 1 if reached else 0,
        first_iteration=first if reached else None,
        last_iteration=last if reached else None,
        first_learning_rate=rates[0] if rates else None,
        last_learning_rate=rates[1] if rates else None,
        datasets=datasets,
    )


def _datasets(fold: FoldPlan, sequence_length: int, drawn: Counter[str]) -> tuple[DatasetRow, ...]:
    """Rows of a fold's datasets; ``drawn`` counts the samples of each so far, by its key."""
    rows = []
    for piece in fold.slices:
        drawn[piece.key] += piece.samples
        row = DatasetRow(
            name=piece.name,
            path=piece.path,
            samples=piece.samples,
            tokens=piece.samples * sequence_length,
            share=piece.samples / fold.samples,
            epochs=piece.samples / piece.samples_per_epoch,
            epochs_so_far=drawn[piece.key] / piece.samples_per_epoch,
        )
        rows.append(row)
    return tuple(rows)
