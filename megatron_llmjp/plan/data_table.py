"""The data plan as a table for people, and as rows for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_llmjp.numbers import aligned, human
from megatron_llmjp.plan.data_plan import DataPlan, DatasetRow, FoldRow

_HEADS = ("", "share", "tokens", "samples", "epochs", "in all", "iterations", "first", "last")
_RATES = ("lr first", "lr last")


def show(plan: DataPlan, warnings: Iterable[str] = ()) -> str:
    """The plan as text: a line per fold and dataset, totals, skipped ranges, warnings."""
    with_rates = any(fold.first_learning_rate is not None for fold in plan.folds)
    lines: list[Sequence[str]] = [(*_HEADS, *(_RATES if with_rates else ()))]
    for fold in plan.folds:
        lines.append(_fold_line(fold, with_rates))
        lines += [_dataset_line(row) for row in fold.datasets]
    samples = sum(fold.samples for fold in plan.folds)
    tokens = human(samples * plan.sequence_length)
    total = ("total", "", tokens, f"{samples:,}", "", "", f"{plan.train_iters:,}")
    parts = [_aligned([*lines, total]), _summary(plan)]
    parts += [
        f"skipped: samples {skip.first:,} to {skip.end - 1:,} ({skip.end - skip.first:,} from fold "
        f"'{skip.fold}' on), before iteration {skip.before_iteration:,}"
        for skip in plan.skips
    ]
    return "\n".join([*parts, *(f"warning: {text}" for text in warnings)])


def as_json(plan: DataPlan, warnings: Iterable[str] = ()) -> dict[str, Any]:
    """The plan with exact numbers, as plain JSON values."""
    return {**asdict(plan), "warnings": list(warnings)}


def as_rows(plan: DataPlan) -> list[dict[str, Any]]:
    """One flat row per fold and dataset, with exact numbers, for a CSV file."""
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
    return (name, "", human(fold.tokens), f"{fold.samples:,}", "", "", *place, *rates)


def _dataset_line(row: DatasetRow) -> Sequence[str]:
    epochs = (_epochs(row.epochs), _epochs(row.epochs_so_far))
    return (f"  {row.name}", f"{row.share:.2%}", human(row.tokens), f"{row.samples:,}", *epochs)


def _epochs(number: float) -> str:
    return f"{number:.3f}" if number == 0 or number >= 0.001 else f"{number:.1g}"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.4g}"


def _summary(plan: DataPlan) -> str:
    sizes = plan.batch_sizes
    size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} growing to {sizes[-1]:,}"
    return (
        f"{plan.train_iters:,} iterations of {size} samples of {plan.sequence_length:,} tokens: "
        f"{human(plan.tokens)} tokens ({plan.tokens:,}) of {len(plan.tokens_by_dataset()):,} "
        f"datasets in {len(plan.folds)} fold{'s' if len(plan.folds) > 1 else ''}"
    )


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    columns = max(map(len, lines))
    cells = [[*line, *[""] * (columns - len(line))] for line in lines]
    return aligned(cells, right=range(1, columns))
