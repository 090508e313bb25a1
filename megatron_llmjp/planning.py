"""Modes that plan a run without training: ``--plan-data``, ``--estimate``, ``--suggest-layout``.

torch is imported only for learning rates, whose schedules are megatron-core's, and to build the
model on the meta device.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import resume, resume_checks
from megatron_llmjp.config.flags import Command, Mode, print_notes
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.config.warnings import RunSize, config_warnings
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataset_tokenizers import mixed_tokenizer_warnings
from megatron_llmjp.data.folds.data_path import given_data_flags
from megatron_llmjp.data.lr_schedule import length_in_iterations
from megatron_llmjp.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from megatron_llmjp.estimate.data_plan import (
    DataPlan,
    LearningRate,
    format_data_plan,
    make_data_plan,
)
from megatron_llmjp.estimate.data_warnings import data_plan_warnings, run_data_warnings
from megatron_llmjp.estimate.estimate_numbers import candidate_numbers, estimate_numbers
from megatron_llmjp.estimate.estimate_report import format_estimate
from megatron_llmjp.estimate.run_estimate import (
    RunEstimate,
    RunLength,
    estimate_run,
    run_length_without_data,
)
from megatron_llmjp.estimate.search.layout_search import search_layouts
from megatron_llmjp.estimate.search.layout_table import format_candidates
from megatron_llmjp.estimate.search.scaling import (
    MULTIPLES,
    format_pareto,
    format_scaling,
    scale_run,
    scaling_numbers,
)
from megatron_llmjp.estimate.shared_documents import (
    shared_document_warnings,
    shared_repetition_warnings,
)
from megatron_llmjp.estimate.speed.measured_runs import ComparedRun, compare_run, format_compared
from megatron_llmjp.placeholders import PlaceholderConfig, substitute_missing
from megatron_llmjp.report.job_history import observe_jobs
from megatron_llmjp.report.step_times import read_measured_run
from megatron_llmjp.run import resolve_run
from megatron_llmjp.run_data import (
    ResolvedData,
    check_run_tokenizer,
    load_run_tokenizer,
    resolve_data,
    train_iterations,
    with_decay_length,
    with_shortened_warmup,
)


def plan_data(config: Config, with_learning_rate: bool = True) -> tuple[DataPlan, list[str]]:
    """Plan the data of a run.

    Args:
        config: the run's configuration; model and layout are ignored.
        with_learning_rate: whether to compute learning rates, which takes seconds.

    Returns:
        The plan, and warnings on it.

    Raises:
        UserError: the fold file, a dataset or a number of iterations is invalid, or a dataset was
            tokenized with another tokenizer than the run's.
    """
    data = resolve_data(config, allow_missing=True)
    return plan_resolved_data(config, data, with_learning_rate)


def plan_resolved_data(
    config: Config, data: ResolvedData, with_learning_rate: bool = True
) -> tuple[DataPlan, list[str]]:
    """Plan the resolved data of a run, as :func:`plan_data`."""
    tokenizer_warnings = _tokenizer_warnings(config, data)
    data = _with_skips(data, config)
    train_iters, _ = train_iterations(config, data.schedule)
    config, _ = with_shortened_warmup(with_decay_length(config, data.schedule, train_iters))
    rate = _learning_rate(config, data, train_iters) if with_learning_rate else None
    declared = frozenset(path for path, info in data.datasets.items() if info.declared)
    plan = make_data_plan(data.schedule, BatchSizeSchedule(config), train_iters, rate, declared)
    found = data_plan_warnings(plan, data.schedule, config, data.folds, data.datasets)
    shared = [
        *shared_document_warnings(data.folds),
        *shared_repetition_warnings(plan.datasets),
    ]
    return plan, [*tokenizer_warnings, *found, *shared]


def print_data_plan(config: Config) -> None:
    """Print the data plan for ``--plan-data``."""
    plan, warnings = plan_data(config)
    print(format_data_plan(plan, warnings))


def _tokenizer_warnings(config: Config, data: ResolvedData) -> list[str]:
    """Return warnings on the tokenizers of the datasets; the run's own may be unset."""
    tokenizer = load_run_tokenizer(config)
    if tokenizer is None:
        return mixed_tokenizer_warnings(data.datasets)
    return check_run_tokenizer(config, data.datasets, tokenizer)


def _with_skips(data: ResolvedData, config: Config) -> ResolvedData:
    """Apply ``--skip-iterations`` and the skips recorded in the checkpoint to resume from."""
    root, manifest = config.checkpoint.load or config.checkpoint.save, None
    if root and not config.checkpoint.finetune and manifests.complete_iterations(Path(root)):
        found = resume.find_checkpoint(config, {})
        manifest = found.manifest if found else None
    skips, sizes = config.data.skip_iterations, BatchSizeSchedule(config)
    schedule, _ = resume_checks.apply_skip_iterations(data.schedule, skips, manifest, sizes)
    return replace(data, schedule=schedule)


def _learning_rate(config: Config, data: ResolvedData, train_iters: int) -> LearningRate:
    from megatron_llmjp.training.optimizer import LearningRateSchedule  # imports torch: seconds

    return LearningRateSchedule(config, data.schedule, BatchSizeSchedule(config), train_iters).at


@dataclass(frozen=True)
class _ResolvedRun:
    """Configuration of a run as far as it can be resolved, with its length and warnings."""

    config: Config
    length: RunLength | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """The estimate of a run, with its notes and warnings."""

    estimate: RunEstimate
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def plan_run(command: Command) -> PlannedRun:
    """Estimate a run.

    Args:
        command: a command with :attr:`Command.machine`.

    Raises:
        UserError: the run is invalid.
    """
    assert command.machine is not None
    return _plan_run(substitute_missing(command.config, data=True), command.machine)


def _plan_run(planned: PlaceholderConfig, machine: PlannedMachine) -> PlannedRun:
    config = planned.config
    check_config(config, machine.world_size)
    measured = _measured_runs(config, machine)
    run = _resolve(config, machine.world_size, planned.tokenizer_is_placeholder)
    save = config.checkpoint.save
    observed = observe_jobs(Path(save)) if save else None
    estimate = estimate_run(run.config, machine, run.length, observed, measured)
    return PlannedRun(estimate, (*planned.notes, *run.notes), run.warnings)


def print_estimate(command: Command) -> int:
    """Print the estimate of a run or suggested layouts, and return the exit code.

    Args:
        command: a command with :attr:`Command.machine`.

    Raises:
        UserError: the run is invalid.
    """
    machine = command.machine
    assert machine is not None
    planned = substitute_missing(command.config, data=True)
    config = planned.config
    if command.mode is Mode.SUGGEST_LAYOUT:
        print_notes(planned.notes)
        return _print_layouts(command, config, machine)
    planned_run = _plan_run(planned, machine)
    estimate = planned_run.estimate
    if command.as_json:
        print(json.dumps(estimate_numbers(estimate)), flush=True)
    else:
        print(format_estimate(estimate, command.config_name), flush=True)
    built = _build_on_meta(estimate)
    if not command.as_json:
        print(f"\n{built}", flush=True)
    for note in planned_run.notes:
        print(f"note: {note}", file=sys.stderr)
    for warning in planned_run.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if estimate.fits:
        return EXIT_DONE
    print(
        f"error: the ranks of stage {estimate.worst_stage} do not fit into GPU memory: use "
        "--suggest-layout instead of --estimate to find layouts that fit",
        file=sys.stderr,
    )
    return EXIT_USER_ERROR


def _print_layouts(command: Command, config: Config, machine: PlannedMachine) -> int:
    """Print suggested layouts, or the scaling over numbers of GPUs, and return the exit code."""
    measured = _measured_runs(config, machine)
    for run in () if command.as_json else measured:
        print(f"{format_compared(run)}\n")
    if machine.scaling:
        scaling = scale_run(config, machine, measured)
        if command.as_json:
            print(json.dumps(scaling_numbers(scaling, machine, config)))
        else:
            print(format_scaling(scaling, machine))
        if machine.scaling_plot:
            from megatron_llmjp.estimate.search.scaling_plot import (
                plot_scaling,  # matplotlib: a second
            )

            plot_scaling(scaling, Path(machine.scaling_plot))
        return EXIT_DONE if any(point.best for point in scaling.strong) else EXIT_USER_ERROR
    found = search_layouts(config, machine, measured)
    multiples = sorted({max(1, round(m * machine.world_size)) for m in MULTIPLES})
    by_gpus = scale_run(config, replace(machine, scaling=tuple(multiples)), measured, weak=False)
    if command.as_json:
        layouts = [candidate_numbers(candidate, config) for candidate in found]
        numbers = scaling_numbers(by_gpus, machine, config)
        print(json.dumps({"layouts": layouts, "by_gpus": numbers}))
    else:
        print(f"{format_candidates(config, machine, found)}\n\n{format_pareto(by_gpus, machine)}")
    return EXIT_DONE if found else EXIT_USER_ERROR


def _measured_runs(config: Config, machine: PlannedMachine) -> list[ComparedRun]:
    """Compare runs on the machine with their predictions: the given ones, or that in ``--save``."""
    if machine.mfu is not None:
        return []
    runs = [read_measured_run(Path(folder), machine.gpu) for folder in machine.measured_runs]
    save = config.checkpoint.save
    if not runs and save is not None:
        try:
            runs.append(read_measured_run(Path(save), machine.gpu))
        except UserError:  # new, too short, or on other devices
            return []
    return [compare_run(run, machine, config) for run in runs]


def _build_on_meta(estimate: RunEstimate) -> str:
    """Build the first ranks with megatron-core and report them; fail if they differ."""
    from megatron_llmjp.patches.torch_cuda_on_cpu import without_compiler  # imports torch

    with without_compiler():
        from megatron_llmjp.estimate.meta_build import build_first_ranks

    ranks = [str(found.rank) for found in build_first_ranks(estimate.config, estimate.layout)]
    shown = ", ".join(ranks if len(ranks) <= 4 else [*ranks[:2], "...", ranks[-1]])
    return (
        f"built on the meta device in process groups of {estimate.layout.world_size}: rank"
        f"{'s' if len(ranks) > 1 else ''} {shown}, with the parameters and groups above"
    )


def _resolve(config: Config, world_size: int, other_tokenizer: bool) -> _ResolvedRun:
    """Resolve a run as at its start if its data is given, and collect notes and warnings.

    ``other_tokenizer`` is whether a placeholder replaces the tokenizer; its mismatches with the
    datasets are not reported.
    """
    if config.data.fold_file is None and not given_data_flags(config.data):
        length = run_length_without_data(config)
        if length is None:
            return _ResolvedRun(config, None, (), ())
        end = length.iterations
        facts = RunSize(
            world_size, end, length_in_iterations(config, "lr_decay") or end, validation_sets=1
        )
        return _ResolvedRun(config, length, (), tuple(config_warnings(config, facts)))
    missing = ["no tokenizer is given; the run needs one"]
    if config.data.tokenizer_type is None:
        other_tokenizer = True
        config = replace_fields(
            config, tokenizer_type="NullTokenizer", allow_tokenizer_mismatch=True
        )
    else:
        missing = []
    run = resolve_run(config, world_size, allow_missing=True)
    if other_tokenizer:
        run = replace(run, tokenizer_mismatches=())
    ends = tuple(run.schedule.sample_range(fold)[1] for fold in run.schedule.folds)
    samples = BatchSizeSchedule(run.config).consumed_after(run.train_iters)
    source = "1 fold" if len(ends) == 1 else f"{len(ends)} folds"
    length = RunLength(run.train_iters, samples, source, ends)
    warnings = [*missing, *run.warnings, *run.config_warnings, *run_data_warnings(run)]
    return _ResolvedRun(run.config, length, run.notes, tuple(warnings))
