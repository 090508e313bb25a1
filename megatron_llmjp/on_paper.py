"""``--rehearse`` and ``--suggest-layout``: a run on paper, from its arguments to its exit code."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from megatron_llmjp.absent import plan_without
from megatron_llmjp.config.checks import check
from megatron_llmjp.config.command import Command, Mode
from megatron_llmjp.config.command_line import print_notes
from megatron_llmjp.config.lint import Facts, lint
from megatron_llmjp.config.load import changed
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.megatron_paths import given_flags
from megatron_llmjp.errors import EXIT_DONE, EXIT_USER_ERROR
from megatron_llmjp.plan.data_warnings import warnings_of_run
from megatron_llmjp.plan.outlook import Length, Outlook, length_without_data, look_ahead
from megatron_llmjp.plan.outlook_text import show
from megatron_llmjp.plan.suggest import suggest
from megatron_llmjp.plan.suggest_text import show_suggestions
from megatron_llmjp.prepare import prepare
from megatron_llmjp.prepare_data import decay_end


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
    planned = plan_without(command.config, data=True)
    config = planned.config
    if command.mode is Mode.SUGGEST_LAYOUT:
        found = suggest(config, rehearsal)
        print_notes(planned.notes)
        print(show_suggestions(config, rehearsal, found))
        return EXIT_DONE if found else EXIT_USER_ERROR
    check(config, rehearsal.world_size)
    run = _resolve(config, rehearsal.world_size, planned.has_other_tokenizer)
    outlook = look_ahead(run.config, rehearsal, run.length)
    print(show(outlook, rehearsal.mfu, command.config_name), flush=True)
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
    from megatron_llmjp.plan.rehearse import rehearse  # imports torch: seconds

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
    if config.data.fold_file is None and not given_flags(config.data):
        length = length_without_data(config)
        if length is None:
            return _Resolved(config, None, (), ())
        end = length.iterations
        facts = Facts(world_size, end, decay_end(config) or end, validation_sets=1)
        return _Resolved(config, length, (), tuple(lint(config, facts)))
    missing = ["no tokenizer is given: the run itself needs one"]
    if config.data.tokenizer_type is None:
        other_tokenizer = True
        config = changed(config, tokenizer_type="NullTokenizer", allow_tokenizer_mismatch=True)
    else:
        missing = []
    run = prepare(config, world_size)
    if other_tokenizer:
        run = replace(run, mismatches=())
    ends = tuple(run.schedule.trainable(fold)[1] for fold in run.schedule.folds)
    samples = BatchSizes(run.config).consumed_after(run.train_iters)
    source = "1 fold" if len(ends) == 1 else f"{len(ends)} folds"
    length = Length(run.train_iters, samples, source, ends)
    told = [*missing, *run.warnings, *run.lints, *warnings_of_run(run)]
    return _Resolved(run.config, length, run.notes, tuple(told))
