"""Everything about a run that can be wrong is found here, before torch or any other process.

``prepare`` reads the tokenizer, the fold file with its datasets, and the checkpoint to go on from,
and returns the resolved run. It is cheap: the process that starts the ranks calls it to speak with
one voice, and each rank calls it to know the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.checkpoint import resume as resuming
from megatron_llmjp.checkpoint.resume import Resume
from megatron_llmjp.config.checks import check
from megatron_llmjp.config.load import changed
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.fold_file import FoldFile
from megatron_llmjp.data.fold_reading import read_fold_file
from megatron_llmjp.data.folds import DatasetInfo, Schedule
from megatron_llmjp.data.resolve import resolve
from megatron_llmjp.data.sources import inspect_sources
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class RunData:
    """The data of a run, resolved."""

    folds: FoldFile
    datasets: dict[str, DatasetInfo]
    """What is known of each dataset, by path."""
    schedule: Schedule


@dataclass(frozen=True)
class Run:
    """A run, resolved."""

    config: Config
    tokenizer: Tokenizer
    folds: FoldFile
    datasets: dict[str, DatasetInfo]
    """What is known of each dataset, by path."""
    schedule: Schedule
    train_iters: int
    resume: Resume | None
    notes: tuple[str, ...]
    """What the user should be told at the start."""

    @property
    def warnings(self) -> list[str]:
        """What went wrong before and should not be overlooked."""
        if self.resume is None:
            return []
        going_on = f"; going on from {self.resume.folder}"
        return [problem + going_on for problem in self.resume.passed_over]

    @property
    def cache(self) -> Path:
        """Folder of sample indices."""
        return cache_folder(self.config)


def prepare(config: Config, world_size: int) -> Run:
    """Resolve a configuration for ``world_size`` processes.

    Raises:
        UserError: whatever is wrong with the layout, tokenizer, data or checkpoint.
    """
    check(config, world_size)
    tokenizer = _tokenizer(config)
    config = _with_vocabulary(config, tokenizer)
    data = prepare_data(config)
    notes: list[str] = []
    resume = resuming.find(config)
    if resume is not None and not config.checkpoint.finetune:
        if resume.manifest.contents != "full":
            raise UserError(
                f"{resume.folder} holds weights without optimizer state: add --finetune to start "
                "a new run from them"
            )
        config, notes = resuming.adopt(config, resume, data.schedule)
    config = changed(config, padded_vocab_size=config.rows)
    train_iters, more = count_iterations(config, data.schedule)
    config, about_decay = _with_decay(config, train_iters)
    check(changed(config, train_iters=train_iters), world_size)
    told = (*notes, *more, *about_decay)
    return Run(
        config,
        tokenizer,
        data.folds,
        data.datasets,
        data.schedule,
        train_iters,
        resume,
        told,
    )


def prepare_data(config: Config) -> RunData:
    """Resolve the data of a run; of the model and the layout nothing need be known.

    Raises:
        UserError: whatever is wrong with the fold file or a dataset.
    """
    if config.data.fold_file is None:
        raise UserError("no data: give --fold-file, the file that declares the folds of the run")
    folds = read_fold_file(Path(config.data.fold_file))
    if folds.sequence_length not in (None, config.data.seq_length):
        raise UserError(
            f"{config.data.fold_file}: sequence_length {folds.sequence_length} differs from the "
            f"run's seq_length {config.data.seq_length}: take one of them away"
        )
    datasets = inspect_sources(folds)
    schedule = resolve(folds, datasets, config.data.seq_length, BatchSizes(config))
    return RunData(folds, datasets, schedule)


def cache_folder(config: Config) -> Path:
    """Folder of sample indices."""
    if config.data.data_cache_path:
        return Path(config.data.data_cache_path)
    return Path(str(config.data.fold_file)).resolve().parent / "index_cache"


def _tokenizer(config: Config) -> Tokenizer:
    if config.data.tokenizer_type is None:
        raise UserError(
            "no tokenizer: give --tokenizer-type and --tokenizer-model, those that "
            "preprocess_data made the datasets with"
        )
    # NullTokenizer counts the ids below its EOD; the model's vocabulary counts that too.
    size = config.model.vocab_size - 1 if config.model.vocab_size else None
    return load_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model, vocab_size=size)


def _with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    if config.model.vocab_size is None:
        return changed(config, vocab_size=tokenizer.vocab_size)
    # Not compared with vocab_size: Megatron's SentencePieceTokenizer adds a piece of its own.
    if tokenizer.vocab_size > config.rows:
        raise UserError(
            f"{config.data.tokenizer_model} has {tokenizer.vocab_size} tokens, but vocab_size is "
            f"{config.model.vocab_size}: leave --vocab-size out, or take the model's tokenizer"
        )
    return config


def count_iterations(config: Config, schedule: Schedule) -> tuple[int, list[str]]:
    """Iterations of the run: the schedule's, unless fewer are asked for; and what to tell of it.

    Raises:
        UserError: there is not one full batch, or more are asked for than the folds have.
    """
    batch = config.training.global_batch_size
    possible, rest = divmod(schedule.total_samples, batch)
    if possible == 0:
        raise UserError(
            f"{config.data.fold_file}: its {schedule.total_samples} samples are less than one "
            f"global batch of {batch}: enlarge the folds or lower global_batch_size"
        )
    asked = config.training.train_iters
    if asked is None:
        note = f"{rest} samples at the end make no full batch and are left out"
        return possible, [note] if rest else []
    if asked > possible:
        raise UserError(
            f"train_iters {asked} needs {asked * batch:,} samples, but the folds of "
            f"{config.data.fold_file} hold {schedule.total_samples:,}, enough for {possible}: "
            "leave train_iters out, or give the folds more tokens"
        )
    note = f"train_iters {asked} ends the run before the folds do (at {possible})"
    return asked, [note] if asked < possible else []


def _with_decay(config: Config, train_iters: int) -> tuple[Config, list[str]]:
    """Fix where the learning rate's decay ends, so that folds added later do not move it."""
    end = config.optimizer.lr_decay_iters
    if end is None:
        return changed(config, lr_decay_iters=train_iters), []
    if end == train_iters or config.optimizer.lr_decay_style == "constant":
        return config, []
    note = f"the learning rate's decay ends at iteration {end}, the run at {train_iters}"
    return config, [note]
