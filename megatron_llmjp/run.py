"""Resolution of a configuration into a run, with all checks that need neither torch nor processes.

:func:`resolve_run` reads the tokenizer, the fold file with its datasets, and the checkpoint to
resume from. The launcher calls it so that one process reports all errors before any rank starts;
each rank calls it again to get the same :class:`Run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron_llmjp.checkpoint import resume as resuming
from megatron_llmjp.checkpoint import resume_checks
from megatron_llmjp.checkpoint.initial_weights import check_weights
from megatron_llmjp.checkpoint.manifest import complete_iterations
from megatron_llmjp.checkpoint.resume import Resume
from megatron_llmjp.checkpoint.resume_checks import NO_SKIPPED_RANGES, RunHistory, SkippedRanges
from megatron_llmjp.checkpoint.save_folder import check_save_folder
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.config.warnings import RunSize, config_warnings
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataset_tokenizers import check_largest_ids
from megatron_llmjp.data.folds.schedule import DatasetInfo, HeldOutDataset, MegatronBlend, Schedule
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.data.lr_schedule import learning_rate_settings, length_in_iterations
from megatron_llmjp.errors import ErrorCollector, UserError
from megatron_llmjp.run_data import (
    ResolvedData,
    check_run_tokenizer,
    data_source_name,
    index_cache_folder,
    load_run_tokenizer,
    repetition_notes,
    resolve_data,
    shuffle_notes,
    train_iterations,
    validation_sets,
    with_decay_length,
    with_shortened_warmup,
    with_stored_keys,
)
from megatron_llmjp.tokenizers import Tokenizer

_NONE_DAMAGED: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Run:
    """A resolved run."""

    requested: Config
    """The configuration as given, before checkpoint and data override it."""
    config: Config
    tokenizer: Tokenizer
    folds: FoldFile
    datasets: dict[str, DatasetInfo]
    """Size and contents of each dataset, by path."""
    schedule: Schedule
    validation: dict[str, HeldOutDataset | MegatronBlend]
    train_iters: int
    resume: Resume | None
    history: RunHistory
    """Data history that the run's checkpoints record."""
    notes: tuple[str, ...]
    """Notes printed at the start."""
    tokenizer_mismatches: tuple[str, ...] = ()
    """Warnings on datasets of another tokenizer, with ``--allow-tokenizer-mismatch``."""
    config_warnings: tuple[str, ...] = ()
    """Warnings on valid settings that are known to cause problems."""

    @property
    def warnings(self) -> list[str]:
        """Warnings on tokenizer mismatches and damaged checkpoints."""
        if self.resume is None:
            return [*self.tokenizer_mismatches]
        resumed = f"; resuming from {self.resume.folder}"
        return [
            *self.tokenizer_mismatches,
            *(damage + resumed for damage in self.resume.rejected),
        ]

    @property
    def cache(self) -> Path:
        """Folder of the sample indices."""
        return index_cache_folder(self.config, self.folds)


def resolve_run(
    config: Config,
    world_size: int,
    damaged: Mapping[str, str] = _NONE_DAMAGED,
    skipped_ranges: SkippedRanges = NO_SKIPPED_RANGES,
    allow_missing: bool = False,
) -> Run:
    """Resolve a configuration for ``world_size`` processes.

    Args:
        config: the requested configuration.
        world_size: number of processes.
        damaged: damage of checkpoint folders that must not be used, by folder.
        skipped_ranges: positions of the schedule to skip, by reason.
        allow_missing: for plans: use the declared sizes of missing datasets.

    Raises:
        UserError: all problems of the layout, tokenizer, data or checkpoint.
    """
    requested = config
    config, tokenizer, data, notes = _read_inputs(config, world_size, allow_missing)
    mismatch = check_run_tokenizer(config, data.datasets, tokenizer)
    vocab_size = max(tokenizer.vocab_size, config.model.vocab_size or 0)
    check_largest_ids(data.datasets, vocab_size, tokenizer.identity())
    resume = resuming.find_checkpoint(config, damaged)
    continued = resume if resume is not None and not config.checkpoint.finetune else None
    if continued is not None:
        data = with_stored_keys(data, config, continued.manifest.folds)
    else:
        notes += shuffle_notes(data)
    config, schedule, history, history_notes = _with_history(
        config, data.schedule, continued, skipped_ranges
    )
    notes += history_notes
    if continued is not None:
        notes += resuming.check_tokenizer(config, continued, tokenizer)
    elif resume is not None:
        notes += check_weights(config, resume)
    config, train_iters, length_notes = _with_length(config, schedule, world_size)
    validation, validation_notes = validation_sets(config, data, train_iters)
    if config.training.eval_only:
        _check_validation(config, resume, validation)
    decay_end = length_in_iterations(config, "lr_decay")
    size = RunSize(world_size, train_iters, decay_end, len(validation))
    return Run(
        requested=requested,
        config=config,
        tokenizer=tokenizer,
        folds=data.folds,
        datasets=data.datasets,
        schedule=schedule,
        validation=validation,
        train_iters=train_iters,
        resume=resume,
        history=history,
        notes=(*notes, *length_notes, *validation_notes),
        tokenizer_mismatches=tuple(mismatch),
        config_warnings=tuple(config_warnings(config, size)),
    )


def _read_inputs(
    config: Config, world_size: int, allow_missing: bool
) -> tuple[Config, Tokenizer, ResolvedData, list[str]]:
    """Check the configuration and the save folder, and read the tokenizer and the datasets.

    Returns:
        The configuration with its vocabulary size, the tokenizer, the data, and notes.

    Raises:
        UserError: all problems, so that none hides another.
    """
    problems = ErrorCollector()
    with problems.collect():
        check_config(config, world_size)
    if problems.lines:
        _raise_all_problems(config, problems)
    notes = _save_folder(config)
    config, start_notes = _ignore_load_after_first_start(config)
    with problems.collect():
        tokenizer = _tokenizer(config)
        config = _with_vocabulary(config, tokenizer)
    with problems.collect():
        data = resolve_data(config, allow_missing)
    problems.report()
    return config, tokenizer, data, [*notes, *start_notes]


def _with_history(
    config: Config, schedule: Schedule, resume: Resume | None, skipped_ranges: SkippedRanges
) -> tuple[Config, Schedule, RunHistory, list[str]]:
    """Skip samples, and adopt the configuration and history of the checkpoint to resume from.

    Returns:
        The configuration, the schedule without skipped samples, the data history, and notes.

    Raises:
        UserError: the data or a frozen field differs from the checkpoint's.
    """
    manifest = resume.manifest if resume is not None else None
    sizes, skips = BatchSizeSchedule(config), config.data.skip_iterations
    schedule, skipped = resume_checks.apply_skip_iterations(
        schedule, skips, manifest, sizes, skipped_ranges
    )
    notes = [*repetition_notes(schedule), *resume_checks.describe_skipped_samples(skipped)]
    if resume is None:
        return config, schedule, RunHistory(skipped), notes
    config, history, changes = resuming.resume_config(config, resume, schedule, skipped)
    return config, schedule, history, [*notes, *changes]


def _with_length(
    config: Config, schedule: Schedule, world_size: int
) -> tuple[Config, int, list[str]]:
    """Resolve the fields that depend on the run's length: learning-rate decay and warm-up.

    Returns:
        The configuration, the number of iterations, and notes.

    Raises:
        UserError: the length contradicts another field.
    """
    config = replace_fields(config, padded_vocab_size=config.padded_vocab_size)
    train_iters, notes = train_iterations(config, schedule)
    config, warmup_notes = with_shortened_warmup(with_decay_length(config, schedule, train_iters))
    check_config(config, world_size)
    learning_rate_settings(config, schedule, BatchSizeSchedule(config), train_iters)
    return config, train_iters, [*notes, *warmup_notes]


def _raise_all_problems(config: Config, problems: ErrorCollector) -> None:
    """Report broken rules together with the errors of tokenizer and data.

    The data is not checked with a batch size ramp-up, which must be valid to compute iterations.

    Raises:
        UserError: always.
    """
    with problems.collect():
        _tokenizer(config)
    if config.training.rampup_batch_size is None:
        with problems.collect():
            resolve_data(config)
    problems.report()


def _check_validation(
    config: Config, resume: Resume | None, sets: Mapping[str, HeldOutDataset | MegatronBlend]
) -> None:
    if resume is None:
        raise UserError("--eval-only validates a checkpoint: pass its folder as --load")
    if not sets:
        where = data_source_name(config.data)
        raise UserError(f"--eval-only: {where} declares no validation sets (docs/folds.md)")


def _save_folder(config: Config) -> list[str]:
    """Return notes on the save folder, if the run writes to one."""
    if config.checkpoint.save is None or config.training.eval_only:
        return []
    return check_save_folder(Path(config.checkpoint.save))


def _ignore_load_after_first_start(config: Config) -> tuple[Config, list[str]]:
    """Ignore ``load`` and ``finetune`` after the first start: the run's own checkpoints are used.

    A job that is requeued with its first command line thereby resumes instead of starting over.
    """
    places = config.checkpoint
    if not (places.save and places.load) or config.training.eval_only:
        return config, []
    save, load = Path(places.save).resolve(), Path(places.load).resolve()
    if load == save or save in load.parents or not complete_iterations(save):
        return config, []
    flags = f"--load {places.load}" + (" --finetune" if places.finetune else "")
    note = f"{places.save} already holds checkpoints of this run: {flags} is ignored"
    return replace_fields(config, load=None, finetune=False), [note]


def _tokenizer(config: Config) -> Tokenizer:
    tokenizer = load_run_tokenizer(config)
    if tokenizer is None:
        raise UserError(
            "no tokenizer: pass the --tokenizer-type and --tokenizer-model that preprocess_data "
            "used for the datasets"
        )
    return tokenizer


def _with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    if config.model.vocab_size is None:
        return replace_fields(config, vocab_size=tokenizer.vocab_size)
    # Not compared with vocab_size: Megatron's SentencePieceTokenizer adds a piece.
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise UserError(
            f"{config.data.tokenizer_model} has {tokenizer.vocab_size} tokens, but vocab_size is "
            f"{config.model.vocab_size}: omit --vocab-size, or use the model's tokenizer"
        )
    return config
