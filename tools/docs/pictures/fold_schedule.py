"""Fold schedule of a run over its iterations: datasets of each fold, and the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.estimate.data_plan import DataPlan, make_data_plan
from megatron_llmjp.formatting import format_count
from megatron_llmjp.run_data import resolve_data, with_decay_length
from tools.docs.pictures.plans import ROOT, config
from tools.docs.pictures.svg import DARK, FILLS, GREY, Picture

PRESET, FOLD_FILE = "llm-jp-13b-v1.0", "examples/reproduce_llm-jp-13b-v1.0/folds.yaml"
LEFT, TOP, WIDTH, BARS, RATES, GAP = 74.0, 74.0, 800.0, 190.0, 110.0, 56.0
POINTS = 200
"""Points of the learning-rate curve."""


@dataclass(frozen=True)
class PlannedRun:
    """Plan of the data, and the learning rate by iteration."""

    plan: DataPlan
    rate: Callable[[int], float]


def planned_run() -> PlannedRun:
    """Plan the run from the declared sizes of its datasets."""
    from megatron_llmjp.training.optimizer import LearningRateSchedule

    run = replace_fields(config(f"--config {PRESET}"), fold_file=str(ROOT / FOLD_FILE))
    data = resolve_data(run, allow_missing=True)
    sizes = BatchSizeSchedule(run)
    length = sizes.iterations(data.schedule.total_samples)[0]
    run = with_decay_length(run, data.schedule, length)
    schedule = LearningRateSchedule(run, data.schedule, sizes, length)
    return PlannedRun(make_data_plan(data.schedule, sizes, length), schedule.at)


def draw() -> str:
    """Return the picture."""
    run = planned_run()
    plan = run.plan
    total = f"{plan.train_iters:,} iterations, {format_count(plan.tokens)} tokens"
    picture = Picture(
        LEFT + WIDTH + 24,
        TOP + BARS + GAP + RATES + 46,
        f"Fold schedule of a run like {PRESET}: {len(plan.folds)} folds, {total}",
    )
    picture.text(LEFT, 24, f"A run like {PRESET}: {len(plan.folds)} folds, {total}", 16, bold=True)
    line = f"plan_folds --config {PRESET} --fold-file {FOLD_FILE}"
    picture.text(LEFT, 44, line, fill=GREY)
    _draw_folds(picture, plan)
    _draw_rate(picture, run)
    return picture.render()


def _x(plan: DataPlan, iteration: float) -> float:
    return LEFT + WIDTH * iteration / plan.train_iters


def _draw_folds(picture: Picture, plan: DataPlan) -> None:
    """Draw a column per fold, divided by the shares of its datasets."""
    names = list(dict.fromkeys(row.name for fold in plan.folds for row in fold.datasets))
    picture.text(LEFT - 10, TOP + 10, "share of", 11, "end", GREY)
    picture.text(LEFT - 10, TOP + 24, "tokens", 11, "end", GREY)
    for fold in plan.folds:
        assert fold.first_iteration is not None and fold.last_iteration is not None
        left, right = _x(plan, fold.first_iteration - 1), _x(plan, fold.last_iteration)
        picture.text((left + right) / 2, TOP - 6, fold.name, 12, "middle", DARK)
        y = TOP
        for row in fold.datasets:
            height = BARS * row.share
            picture.rect(left, y, right - left, height, FILLS[names.index(row.name)], "white", 0.7)
            if height > 40:
                share = f"{100 * row.share:.0f} %"
                picture.text((left + right) / 2, y + height / 2 + 4, share, 11, "middle")
            y += height
    entries = [(FILLS[index], name) for index, name in enumerate(names)]
    picture.legend(LEFT, TOP + BARS + 26, entries, 112)


def _draw_rate(picture: Picture, run: PlannedRun) -> None:
    """Draw the learning rate below the folds."""
    top, length = TOP + BARS + GAP, run.plan.train_iters
    steps = sorted(
        {1 + round(i * (length - 1) / POINTS) for i in range(POINTS + 1)}
        | {fold.first_iteration or 1 for fold in run.plan.folds}
        | {fold.last_iteration or 1 for fold in run.plan.folds}
    )
    rates = [run.rate(step) for step in steps]
    peak = max(rates)
    picture.text(LEFT - 10, top + 10, "learning", 11, "end", GREY)
    picture.text(LEFT - 10, top + 24, "rate", 11, "end", GREY)
    picture.text(LEFT - 10, top + 42, f"{peak:.1e}", 11, "end", DARK)
    picture.line([(LEFT, top + RATES), (LEFT + WIDTH, top + RATES)], GREY)
    points = [
        (_x(run.plan, step), top + RATES - RATES * rate / peak)
        for step, rate in zip(steps, rates, strict=True)
    ]
    picture.line(points, "#1a5fb4", 2)
    for iteration in _ticks(length):
        x = _x(run.plan, iteration)
        picture.line([(x, top + RATES), (x, top + RATES + 5)], GREY)
        picture.text(x, top + RATES + 18, f"{iteration:,}", 11, "middle", GREY)
    picture.text(LEFT + WIDTH / 2, top + RATES + 36, "iteration", 11, "middle", GREY)


def _ticks(length: int) -> Sequence[int]:
    return range(0, length, 20_000)
