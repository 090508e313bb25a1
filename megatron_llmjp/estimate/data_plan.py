"""Plan of a run's data by fold: tokens, epochs, iterations and learning rates; text, JSON and CSV.

The plan is computed from the schedule alone, without torch, tokenizer or model; the caller passes
the learning rate as a function. Warnings on a plan are in ``data_warnings.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schedule import FoldPlan, Schedule
from megatron_llmjp.estimate.repetition import DatasetUse, dataset_uses, format_uses
from megatron_llmjp.formatting import format_count, format_table

LearningRate = Callable[[int], float]
"""Maps an iteration (from 1) to its learning rate."""

_HEADS = ("", "share", "tokens", "samples", "epochs", "total", "iterations", "first", "last")
_RATES = ("lr first", "lr last")


@dataclass(frozen=True)
class DatasetRow:
    """Samples that one fold takes from one dataset."""

    name: str
    path: str
    samples: int
    tokens: int
    share: float
    """Fraction of the fold's samples."""
    epochs: float
    epochs_so_far: float
    """Epochs of this dataset in all folds up to and including this one."""
    declared: bool = False
    """Whether its files are missing, and its size is the one declared in the fold file."""


@dataclass(frozen=True)
class FoldRow:
    """One fold: its size and its position in the run."""

    name: str
    order: str
    samples: int
    """Scheduled samples, including skipped ones."""
    tokens: int
    skipped: int
    iterations: int
    """Iterations that train on the fold; one that spans two folds counts for both."""
    first_iteration: int | None
    """None if the run ends before the fold begins."""
    last_iteration: int | None
    first_learning_rate: float | None
    last_learning_rate: float | None
    datasets: tuple[DatasetRow, ...]


@dataclass(frozen=True)
class SkipRow:
    """One range of skipped sample positions."""

    first: int
    end: int
    fold: str
    """The fold of its first sample."""
    before_iteration: int
    """First iteration after the range."""


@dataclass(frozen=True)
class DataPlan:
    """Plan of all folds, with totals."""

    sequence_length: int
    batch_sizes: tuple[int, ...]
    """Every global batch size of the run, ascending."""
    folds: tuple[FoldRow, ...]
    skips: tuple[SkipRow, ...]
    train_iters: int
    samples: int
    """Samples that are trained on."""
    tokens: int
    unused_samples: int
    """Scheduled samples after the run's last iteration."""
    datasets: tuple[DatasetUse, ...] = ()
    """Use of each dataset in the whole run."""


def make_data_plan(
    schedule: Schedule,
    sizes: BatchSizeSchedule,
    train_iters: int | None = None,
    learning_rate: LearningRate | None = None,
    declared: Collection[str] = (),
) -> DataPlan:
    """Compute the plan of a run's data.

    Args:
        schedule: the resolved folds.
        sizes: the run's global batch sizes.
        train_iters: last iteration; default: the end of the folds.
        learning_rate: learning rate by iteration; default: the plan has no learning rates.
        declared: paths of the datasets whose sizes are declared.
    """
    if train_iters is None:
        train_iters = sizes.iterations(schedule.total_samples)[0]
    used = sizes.consumed_after(train_iters)
    drawn: Counter[str] = Counter()
    rows = []
    for fold in schedule.folds:
        datasets = _datasets(fold, schedule.sequence_length, drawn, declared)
        rows.append(_fold(fold, datasets, schedule, sizes, train_iters, learning_rate))
    skips = [
        SkipRow(
            first=first,
            end=end,
            fold=schedule.fold_at_position(first).name,
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
        unused_samples=schedule.total_samples - used,
        datasets=dataset_uses(schedule, used),
    )


def _fold(
    fold: FoldPlan,
    datasets: tuple[DatasetRow, ...],
    schedule: Schedule,
    sizes: BatchSizeSchedule,
    train_iters: int,
    learning_rate: LearningRate | None,
) -> FoldRow:
    begin, end = schedule.sample_range(fold)
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


def _datasets(
    fold: FoldPlan, sequence_length: int, drawn: Counter[str], declared: Collection[str]
) -> tuple[DatasetRow, ...]:
    """Return the rows of a fold's datasets; ``drawn`` counts samples so far by dataset key."""
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
            declared=piece.path in declared,
        )
        rows.append(row)
    return tuple(rows)


def format_data_plan(plan: DataPlan, warnings: Iterable[str] = ()) -> str:
    """Format the plan: a line per fold and dataset, totals, skipped ranges, warnings."""
    with_rates = any(fold.first_learning_rate is not None for fold in plan.folds)
    lines: list[Sequence[str]] = [(*_HEADS, *(_RATES if with_rates else ()))]
    for fold in plan.folds:
        lines.append(_fold_line(fold, with_rates))
        lines += [_dataset_line(row) for row in fold.datasets]
    samples = sum(fold.samples for fold in plan.folds)
    tokens = format_count(samples * plan.sequence_length)
    total = ("total", "", tokens, f"{samples:,}", "", "", f"{plan.train_iters:,}")
    parts = [_aligned([*lines, total]), _summary(plan), *_declared(plan)]
    if uses := format_uses(plan.datasets):
        parts.append(uses)
    parts += [
        f"skipped: samples {skip.first:,} to {skip.end - 1:,} ({skip.end - skip.first:,} samples, "
        f"starting in fold '{skip.fold}'), before iteration {skip.before_iteration:,}"
        for skip in plan.skips
    ]
    return "\n".join([*parts, *(f"warning: {text}" for text in warnings)])


def as_json(plan: DataPlan, warnings: Iterable[str] = ()) -> dict[str, Any]:
    """Return the plan with exact numbers, as plain JSON values."""
    return {**asdict(plan), "warnings": list(warnings)}


def as_rows(plan: DataPlan) -> list[dict[str, Any]]:
    """Return one flat row per fold and dataset with exact numbers, for a CSV file."""
    rows = []
    for fold in plan.folds:
        place = {k: v for k, v in asdict(fold).items() if k not in ("datasets", "name")}
        of_fold = {f"fold_{k}" if k in ("samples", "tokens") else k: v for k, v in place.items()}
        for row in fold.datasets:
            own = {"dataset" if k == "name" else k: v for k, v in asdict(row).items()}
            rows.append({"fold": fold.name, **own, **of_fold})
    return rows


def _fold_line(fold: FoldRow, with_rates: bool) -> Sequence[str]:
    if fold.first_iteration is None:
        place = ["0", "not", "reached"]
    else:
        numbers = (fold.iterations, fold.first_iteration, fold.last_iteration or 0)
        place = [f"{n:,}" for n in numbers]
    rates = []
    if with_rates and fold.first_iteration is not None:
        rates = [_rate(fold.first_learning_rate), _rate(fold.last_learning_rate)]
    name = fold.name if fold.order == "folds" else f"{fold.name} ({fold.order} order)"
    return (name, "", format_count(fold.tokens), f"{fold.samples:,}", "", "", *place, *rates)


def _dataset_line(row: DatasetRow) -> Sequence[str]:
    epochs = (_epochs(row.epochs), _epochs(row.epochs_so_far))
    return (
        f"  {row.name}{' (declared)' if row.declared else ''}",
        f"{row.share:.2%}",
        format_count(row.tokens),
        f"{row.samples:,}",
        *epochs,
    )


def _epochs(number: float) -> str:
    return f"{number:.3f}" if number == 0 or number >= 0.001 else f"{number:.1g}"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.4g}"


def _summary(plan: DataPlan) -> str:
    sizes = plan.batch_sizes
    paths = {row.path for fold in plan.folds for row in fold.datasets}
    size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} increasing to {sizes[-1]:,}"
    return (
        f"{plan.train_iters:,} iterations of {size} samples of {plan.sequence_length:,} tokens: "
        f"{format_count(plan.tokens)} tokens ({plan.tokens:,}) of "
        f"{len(paths):,} datasets in {len(plan.folds)} "
        f"fold{'s' if len(plan.folds) > 1 else ''}"
    )


def _declared(plan: DataPlan) -> Iterator[str]:
    paths = {row.path: row.declared for fold in plan.folds for row in fold.datasets}
    if count := sum(paths.values()):
        yield (
            f"declared: {count:,} of {len(paths):,} datasets have no files here; their sizes are "
            "those declared in the fold file"
        )


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    columns = max(map(len, lines))
    cells = [[*line, *[""] * (columns - len(line))] for line in lines]
    return format_table(cells, right=range(1, columns))
