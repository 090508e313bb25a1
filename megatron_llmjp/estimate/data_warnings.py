"""Warnings on a run's data: repeated data, and schedules that do not match the data.

Warnings on documents that several datasets share are in ``shared_documents.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_llmjp.config.learning_rate_rules import decay_warnings
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schedule import DatasetInfo, DatasetSlice, Schedule
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.data.lr_schedule import length_in_iterations
from megatron_llmjp.estimate.data_plan import DataPlan, make_data_plan
from megatron_llmjp.estimate.repetition import repetition_warnings
from megatron_llmjp.formatting import format_names
from megatron_llmjp.run import Run


def data_plan_warnings(
    plan: DataPlan,
    schedule: Schedule,
    config: Config,
    file: FoldFile,
    datasets: Mapping[str, DatasetInfo],
) -> list[str]:
    """Return all warnings on the data plan of a run.

    Args:
        plan: the data plan.
        schedule: the schedule it was made from.
        config: the run's configuration; only data, batch sizes and learning rate are used.
        file: the fold file, for validation sets and per-fold learning rates.
        datasets: size of each dataset, by path.
    """
    sizes = BatchSizeSchedule(config)
    return [
        *_sizes(plan, schedule, sizes),
        *_end(plan, schedule, sizes),
        *_continued(schedule),
        *_used_twice(schedule),
        *repetition_warnings(plan.datasets),
        *_trained_and_validated(schedule, file, datasets),
        *_decay(plan, schedule, config),
        *_warmup(plan, config),
        *_fold_schedules(plan, schedule, sizes),
    ]


def run_data_warnings(run: Run) -> list[str]:
    """Return the warnings on the data plan that a run prints at its start.

    ``config_warnings`` covers the end of the learning-rate decay; folds that continue a dataset are
    reported in plans only.
    """
    sizes = BatchSizeSchedule(run.config)
    plan = make_data_plan(run.schedule, sizes, run.train_iters)
    return [
        *_sizes(plan, run.schedule, sizes),
        *_end(plan, run.schedule, sizes),
        *_used_twice(run.schedule),
        *repetition_warnings(plan.datasets),
        *_trained_and_validated(run.schedule, run.folds, run.datasets),
        *_warmup(plan, run.config),
        *_fold_schedules(plan, run.schedule, sizes),
    ]


def _sizes(plan: DataPlan, schedule: Schedule, sizes: BatchSizeSchedule) -> Iterator[str]:
    for fold in schedule.folds:
        batch = sizes.at(schedule.sample_range(fold)[0])
        if fold.samples < batch:
            yield (
                f"fold '{fold.name}' has {fold.samples:,} samples, less than one global batch of "
                f"{batch:,}: it shares its iteration with adjacent folds"
            )
        empty = [piece.name for piece in fold.slices if piece.samples == 0]
        if empty:
            yield (
                f"fold '{fold.name}': the share of {format_names(empty)} is less than one sample: "
                "no sample of it is trained on"
            )
    for row in plan.folds:
        if row.skipped == row.samples:
            yield f"fold '{row.name}': all of its {row.samples:,} samples are skipped"


def _end(plan: DataPlan, schedule: Schedule, sizes: BatchSizeSchedule) -> Iterator[str]:
    possible, rest = sizes.iterations(schedule.total_samples)
    if plan.train_iters < possible:
        missed = [row.name for row in plan.folds if row.first_iteration is None]
        yield (
            f"the run ends at iteration {plan.train_iters:,}, the folds at {possible:,}: "
            f"{plan.unused_samples:,} samples are not trained on"
            + (f", including all of fold {format_names(missed)}" if missed else "")
        )
    elif rest:
        yield (
            f"the last {rest:,} samples do not fill a batch of {plan.batch_sizes[-1]:,} and are "
            "dropped"
        )


Uses = dict[str, list[tuple[str, DatasetSlice]]]
"""By dataset key, the folds that use it and their slices."""


def _uses(schedule: Schedule) -> Uses:
    uses: Uses = {}
    for fold in schedule.folds:
        for piece in fold.slices:
            uses.setdefault(piece.key, []).append((fold.name, piece))
    return uses


def _epochs(places: Sequence[tuple[str, DatasetSlice]]) -> float:
    """Return the epochs of a dataset in the whole run."""
    return sum(piece.samples for _, piece in places) / places[-1][1].samples_per_epoch


def _continued(schedule: Schedule) -> Iterator[str]:
    """Report datasets that several folds continue."""
    megatron_folds = _in_megatron_order(schedule)
    several = [
        text
        for places in _uses(schedule).values()
        if (text := _in_several_folds(places)) and not megatron_folds & {name for name, _ in places}
    ]
    if several:
        yield (
            f"used in more than one fold: {format_names(several)}; a fold continues where the "
            "last one stopped, unless it has `restart: true`"
        )


def _used_twice(schedule: Schedule) -> Iterator[str]:
    """Warn of datasets whose samples are, or may be, used more than once."""
    megatron_folds = _in_megatron_order(schedule)
    mixed: list[str] = []
    often: list[str] = []
    for places in _uses(schedule).values():
        piece = places[-1][1]
        folds = [name for name, _ in places]
        for name in sorted({n for n in folds if folds.count(n) > 1}):
            names = [f"'{p.name}'" for fold, p in places if fold == name]
            yield f"fold '{name}': {' and '.join(names)} are the same dataset ({piece.path})"
        text = _in_several_folds(places)
        if text and megatron_folds.intersection(folds):
            mixed.append(text)
        if max(p.end for _, p in places) > piece.samples_per_epoch:
            often.append(f"{piece.path} ({_epochs(places):.2f} epochs)")
    if mixed:
        yield (
            f"used in Megatron-LM's order and in other folds: {format_names(mixed)}; that order "
            "cannot continue where another fold stopped: samples may be repeated"
        )
    if often:
        yield f"samples are repeated: {format_names(often)}"


def _in_megatron_order(schedule: Schedule) -> set[str]:
    return {fold.name for fold in schedule.folds if fold.megatron is not None}


def _in_several_folds(places: Sequence[tuple[str, DatasetSlice]]) -> str:
    """Format a dataset with the number of folds that use it; empty for one fold."""
    folds = len({name for name, _ in places})
    epochs = _epochs(places)
    return (
        f"{places[-1][1].path} ({folds} folds, {epochs:.2f} epochs in total)" if folds > 1 else ""
    )


def _trained_and_validated(
    schedule: Schedule, file: FoldFile, datasets: Mapping[str, DatasetInfo]
) -> Iterator[str]:
    trained = {
        piece.key: fold
        for fold in reversed(schedule.folds)
        for piece in fold.slices
        if fold.megatron is None or fold.megatron.split is None  # a split is disjoint
    }
    for name, held_out in file.validation.items():
        if held_out.path is None:
            continue
        fold = trained.get(datasets[held_out.path].key)
        if fold is not None:
            yield (
                f"validation set '{name}' ({held_out.path}) is also trained on, from fold "
                f"'{fold.name}' on: its loss does not measure generalization"
            )


def _decay(plan: DataPlan, schedule: Schedule, config: Config) -> Iterator[str]:
    """Warn of a decay that does not end with the run; folds may have their own schedules."""
    own = _own_iterations(schedule, BatchSizeSchedule(config))
    end = length_in_iterations(config, "lr_decay")
    return decay_warnings(config.optimizer, end, plan.train_iters, own)


def _warmup(plan: DataPlan, config: Config) -> Iterator[str]:
    warmup, first = length_in_iterations(config, "lr_warmup") or 0, plan.folds[0]
    fraction = config.optimizer.lr_warmup_fraction
    if fraction is not None:
        warmup = int(fraction * (length_in_iterations(config, "lr_decay") or plan.train_iters))
    if first.last_iteration is not None and warmup > first.last_iteration:
        yield (
            f"the warm-up of {warmup:,} iterations is longer than the first fold "
            f"('{first.name}', {first.last_iteration:,} iterations)"
        )


def _fold_schedules(plan: DataPlan, schedule: Schedule, sizes: BatchSizeSchedule) -> Iterator[str]:
    """Warn of per-fold learning-rate schedules that do not match their fold's length."""
    for fold in schedule.folds:
        own = fold.learning_rate
        if own is None:
            continue
        before, end = (_begun(sizes, number) for number in schedule.sample_range(fold))
        length = min(end, plan.train_iters) - before
        if (own.lr_warmup_iters or 0) > length > 0:
            yield (
                f"fold '{fold.name}': its warm-up of {own.lr_warmup_iters:,} iterations is longer "
                f"than the fold ({length:,})"
            )
        decay = own.lr_decay_iters
        if decay is not None and decay != length > 0:
            when = "before" if decay < length else "after"
            yield (
                f"fold '{fold.name}': its learning rate's decay ends after {decay:,} iterations, "
                f"{abs(decay - length):,} {when} the fold does ({length:,})"
            )


def _own_iterations(schedule: Schedule, sizes: BatchSizeSchedule) -> list[range]:
    """Return the iterations of the folds that have their own learning-rate schedule."""
    bounds = [schedule.sample_range(fold) for fold in schedule.folds if fold.learning_rate]
    return [range(_begun(sizes, a) + 1, _begun(sizes, b) + 1) for a, b in bounds]


def _begun(sizes: BatchSizeSchedule, number: int) -> int:
    """Count the iterations whose first sample precedes sample ``number``."""
    full, rest = sizes.iterations(number)
    return full + (rest > 0)
