"""Modes that plan a run without training: ``--plan-data``, ``--rehearse``, ``--suggest-layout``.

``--plan-data`` and ``plan_folds``: the table of the run's data, without GPUs or a model.

torch is imported for the learning rate alone, whose curves are megatron-core's.

``--rehearse`` and ``--suggest-layout``: a run on paper, from its arguments to its exit code.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import resume, resume_checks
from megatron_llmjp.config.flags import Command, Mode, print_notes
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.config.warnings import RunSize, config_warnings
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataset_tokenizers import mixed_tokenizer_warnings
from megatron_llmjp.data.folds.data_path import given_data_flags
from megatron_llmjp.errors import EXIT_DONE, EXIT_USER_ERROR
from megatron_llmjp.estimate.data_plan import DataPlan, LearningRate, format_data_plan, make_plan
from megatron_llmjp.estimate.data_warnings import find_warnings, overlaps, warnings_of_run
from megatron_llmjp.estimate.layout_search import show_suggestions, suggest
from megatron_llmjp.estimate.run_estimate import (
    Length,
    Outlook,
    format_estimate,
    length_without_data,
    look_ahead,
)
from megatron_llmjp.placeholders import substitute_missing
from megatron_llmjp.run import resolve_run
from megatron_llmjp.run_data import (
    ResolvedData,
    check_run_tokenizer,
    decay_end_iteration,
    load_run_tokenizer,
    resolve_data,
    train_iterations,
    with_decay_length,
    with_shortened_warmup,
)


@dataclass(frozen=True)
class Planned:
    """The table and what is to be said of it."""

    plan: DataPlan
    warnings: tuple[str, ...]


def plan_data(config: Config, with_learning_rate: bool = True) -> Planned:
    """Plan the data of a run.

    Args:
        config: the run's; its model and layout are not looked at.
        with_learning_rate: whether to work out learning rates, which takes seconds.

    Raises:
        UserError: the fold file, a dataset or a number of iterations is wrong, or a dataset was
            made with another tokenizer than the run's.
    """
    data = resolve_data(config)
    makers = _makers(config, data)
    data = _with_skips(data, config)
    train_iters, _ = train_iterations(config, data.schedule)
    config, _ = with_shortened_warmup(with_decay_length(config, data.schedule, train_iters))
    rate = _learning_rate(config, data, train_iters) if with_learning_rate else None
    plan = make_plan(data.schedule, BatchSizeSchedule(config), train_iters, rate)
    found = find_warnings(plan, data.schedule, config, data.folds, data.datasets)
    return Planned(plan, (*makers, *found, *overlaps(data.folds)))


def print_plan(config: Config) -> None:
    """Print the table for ``--plan-data``."""
    planned = plan_data(config)
    print(format_data_plan(planned.plan, planned.warnings))


def _makers(config: Config, data: ResolvedData) -> list[str]:
    """Warnings on the tokenizers that made the datasets; a run may name none here."""
    tokenizer = load_run_tokenizer(config)
    if tokenizer is None:
        return mixed_tokenizer_warnings(data.datasets)
    return check_run_tokenizer(config, data.datasets, tokenizer)


def _with_skips(data: ResolvedData, config: Config) -> ResolvedData:
    """With what ``--skip-iterations`` leaves out, now and before the checkpoint to go on from."""
    root, manifest = config.checkpoint.load or config.checkpoint.save, None
    if root and not config.checkpoint.finetune and manifests.complete_iterations(Path(root)):
        found = resume.find(config, {})
        manifest = found.manifest if found else None
    asked, sizes = config.data.skip_iterations, BatchSizeSchedule(config)
    schedule, _ = resume_checks.skip_iterations(data.schedule, asked, manifest, sizes)
    return replace(data, schedule=schedule)


def _learning_rate(config: Config, data: ResolvedData, train_iters: int) -> LearningRate:
    from megatron_llmjp.training.lr_scheduler import LearningRates  # imports torch: seconds

    return LearningRates(config, data.schedule, BatchSizeSchedule(config), train_iters).at


@dataclass(frozen=True)
class _Resolved:
    """As much of a run as is known."""

    config: Config
    length: Length | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def on_paper(command: Command) -> int:
    """Print a rehearsal or suggestions; the exit code.

    Args:
        command: with :attr:`Command.rehearsal`, the machine.

    Raises:
        UserError: the run is not possible.
    """
    rehearsal = command.rehearsal
    assert rehearsal is not None
    planned = substitute_missing(command.config, data=True)
    config = planned.config
    if command.mode is Mode.SUGGEST_LAYOUT:
        found = suggest(config, rehearsal)
        print_notes(planned.notes)
        print(show_suggestions(config, rehearsal, found))
        return EXIT_DONE if found else EXIT_USER_ERROR
    check_config(config, rehearsal.world_size)
    run = _resolve(config, rehearsal.world_size, planned.tokenizer_is_placeholder)
    outlook = look_ahead(run.config, rehearsal, run.length)
    print(format_estimate(outlook, rehearsal.mfu, command.config_name), flush=True)
    print(f"\n{_build(outlook)}", flush=True)
    for note in (*planned.notes, *run.notes):
        print(f"note: {note}", file=sys.stderr)
    for warning in run.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if outlook.fits:
        return EXIT_DONE
    print(
        f"error: the ranks of stage {outlook.worst} do not fit their GPU: --suggest-layout in "
        "place of --rehearse names layouts that do",
        file=sys.stderr,
    )
    return EXIT_USER_ERROR


def _build(outlook: Outlook) -> str:
    """Have megatron-core set the ranks up, which fails if it makes something else of them."""
    from megatron_llmjp.estimate.meta_build import rehearse  # imports torch: seconds

    ranks = [str(found.rank) for found in rehearse(outlook.config, outlook.layout)]
    shown = ", ".join(ranks if len(ranks) <= 4 else [*ranks[:2], "...", ranks[-1]])
    return (
        f"built on meta tensors in groups of {outlook.layout.world_size} processes: rank"
        f"{'s' if len(ranks) > 1 else ''} {shown}, with the parameters and groups above"
    )


def _resolve(config: Config, world_size: int, other_tokenizer: bool) -> _Resolved:
    """All that the run itself would find out at its start, where its data is given.

    A stand-in for the tokenizer, which is no reason to warn, is ``other_tokenizer``.
    """
    if config.data.fold_file is None and not given_data_flags(config.data):
        length = length_without_data(config)
        if length is None:
            return _Resolved(config, None, (), ())
        end = length.iterations
        facts = RunSize(world_size, end, decay_end_iteration(config) or end, validation_sets=1)
        return _Resolved(config, length, (), tuple(config_warnings(config, facts)))
    missing = ["no tokenizer is given: the run itself needs one"]
    if config.data.tokenizer_type is None:
        other_tokenizer = True
        config = replace_fields(
            config, tokenizer_type="NullTokenizer", allow_tokenizer_mismatch=True
        )
    else:
        missing = []
    run = resolve_run(config, world_size)
    if other_tokenizer:
        run = replace(run, tokenizer_mismatches=())
    ends = tuple(run.schedule.sample_range(fold)[1] for fold in run.schedule.folds)
    samples = BatchSizeSchedule(run.config).consumed_after(run.train_iters)
    source = "1 fold" if len(ends) == 1 else f"{len(ends)} folds"
    length = Length(run.train_iters, samples, source, ends)
    told = [*missing, *run.warnings, *run.config_warnings, *warnings_of_run(run)]
    return _Resolved(run.config, length, run.notes, tuple(told))
