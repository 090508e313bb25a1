"""Resolution of a run's data without torch: fold schedule, iterations, decay, validation sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.schema import Config, DataConfig
from megatron_llmjp.data.batch_size import BatchSizeSchedule, RunLimit, planned_samples, run_limits
from megatron_llmjp.data.dataset_tokenizers import check_dataset_tokenizers
from megatron_llmjp.data.folds import datasets as fold_datasets
from megatron_llmjp.data.folds.data_path import fold_file_from_flags, given_data_flags
from megatron_llmjp.data.folds.datasets import inspect_datasets
from megatron_llmjp.data.folds.fingerprint import FoldFingerprint
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.folds.resolve import (
    MAX_STORED_ENTRIES,
    resolve_folds,
    resolve_validation,
)
from megatron_llmjp.data.folds.schedule import DatasetInfo, HeldOutDataset, MegatronBlend, Schedule
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.data.lr_schedule import length_in_iterations
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer, load_tokenizer
from megatron_llmjp.tokenizers.base import TikTokenSettings


@dataclass(frozen=True)
class ResolvedData:
    """Resolved data of a run."""

    folds: FoldFile
    datasets: dict[str, DatasetInfo]
    """Size and contents of each dataset, by path."""
    schedule: Schedule


def resolve_data(config: Config, allow_missing: bool = False) -> ResolvedData:
    """Resolve the data of a run; model and layout are not used.

    Args:
        config: configuration of the run.
        allow_missing: for plans: use the sizes that the fold file declares of missing datasets.

    Raises:
        UserError: all problems of the fold file and its datasets.
    """
    length = config.data.seq_length
    if given_data_flags(config.data):
        samples = planned_samples(config, BatchSizeSchedule(config))
        folds = fold_file_from_flags(config.data, samples, config.training.seed)
    elif config.data.fold_file is None:
        raise UserError(
            "no data: pass --fold-file, the file that defines the folds of the run, or "
            "--data-path as in Megatron-LM"
        )
    else:
        folds = read_fold_file(Path(config.data.fold_file))
    if folds.sequence_length not in (None, length):
        raise UserError(
            f"{config.data.fold_file}: sequence_length {folds.sequence_length} differs from the "
            f"run's seq_length {length}: remove one of them"
        )
    datasets = inspect_datasets(folds, index_cache_folder(config, folds), allow_missing)
    return _resolve(folds, datasets, config)


def with_stored_keys(
    data: ResolvedData, config: Config, records: Mapping[str, FoldFingerprint]
) -> ResolvedData:
    """Return the data with the dataset keys and the shuffling that a checkpoint stores.

    Shuffling that the fold file states is kept.

    Args:
        data: data resolved without the checkpoint.
        config: configuration of the run.
        records: the folds that the checkpoint was trained on, by name.
    """
    blends = {fold.name: fold.blend for fold in data.folds.folds}
    known = [
        (dataset.key, blends[name][dataset_name].path)
        for name, record in records.items()
        for dataset_name, dataset in (record.datasets or {}).items()
        if dataset_name in blends.get(name, {})
    ]
    data = _with_recorded_shuffle(data, config, records)
    found = _resolved_again(data, config, fold_datasets.with_recorded_keys(data.datasets, known))
    if all(record.datasets is not None for record in records.values()):
        return found
    # Of folds without datasets the checkpoint stores the digests only.
    earlier = _resolved_again(data, config, fold_datasets.with_legacy_keys(data.datasets))
    digests = {record.digest for record in records.values()}
    return earlier if digests & {fold.digest for fold in earlier.schedule.folds} else found


def _with_recorded_shuffle(
    data: ResolvedData, config: Config, records: Mapping[str, FoldFingerprint]
) -> ResolvedData:
    recorded = [record.shuffle for record in records.values()]
    if data.folds.shuffle is not None or not recorded or recorded[-1] == data.schedule.shuffle:
        return data
    folds = data.folds.model_copy(update={"shuffle": recorded[-1]})
    return _resolve(folds, data.datasets, config)


def _resolved_again(
    data: ResolvedData, config: Config, datasets: dict[str, DatasetInfo]
) -> ResolvedData:
    return data if datasets == data.datasets else _resolve(data.folds, datasets, config)


def _resolve(folds: FoldFile, datasets: dict[str, DatasetInfo], config: Config) -> ResolvedData:
    length, sizes = config.data.seq_length, BatchSizeSchedule(config)
    return ResolvedData(folds, datasets, resolve_folds(folds, datasets, length, sizes))


def train_iterations(config: Config, schedule: Schedule) -> tuple[int, list[str]]:
    """Return the number of iterations, from the limits and the schedule, and notes on the end.

    Raises:
        UserError: there is no full batch, or the limits need more samples than the folds have.
    """
    batch_sizes, where = BatchSizeSchedule(config), data_source_name(config.data)
    possible, rest = batch_sizes.iterations(schedule.total_samples)
    if possible == 0:
        raise UserError(
            f"{where}: its {schedule.total_samples} samples are fewer than one global batch of "
            f"{batch_sizes.at(0)}: enlarge the folds or reduce global_batch_size"
        )
    found = run_limits(config, batch_sizes)
    if not found:
        note = f"the last {rest} samples do not fill a batch and are dropped"
        return possible, [note] if rest else []
    first = found[0]
    if first.iteration == 0:
        raise UserError(f"{first} is less than one global batch of {batch_sizes.at(0)}: raise it")
    if first.samples <= schedule.total_samples:
        return min(first.iteration, possible), _first_limit_note(found, possible)
    if first.samples <= schedule.total_positions:
        return possible, [
            f"the run ends at iteration {possible:,}, not with {first} at iteration "
            f"{first.iteration:,}: samples are skipped"
        ]
    raise UserError(
        f"{first.name} {first.value} needs {first.samples:,} samples, but the folds of {where} "
        f"hold {schedule.total_samples:,}, enough for {possible} iterations: remove {first.name}, "
        "or give the folds more tokens"
    )


def _first_limit_note(found: list[RunLimit], possible: int) -> list[str]:
    """Return a note on which of several limits ends the run; none if there is only one."""
    first, *others = found
    later = [f"{limit} (iteration {limit.iteration:,})" for limit in others]
    if first.iteration < possible:
        later.append(f"the folds (iteration {possible:,})")
    if not later:
        return []
    end = min(first.iteration, possible)
    return [f"{first} ends the run at iteration {end:,}, before {' and '.join(later)}"]


def with_decay_length(config: Config, schedule: Schedule, train_iters: int) -> Config:
    """Set the end of the learning-rate decay, so that folds added later do not change it.

    By default it is that of Megatron-LM: train_samples or train_iters, even if train_tokens ends
    the run earlier.
    """
    o, training = config.optimizer, config.training
    if any(end is not None for end in (o.lr_decay_iters, o.lr_decay_samples, o.lr_decay_tokens)):
        return config
    if o.lr_decay_fraction is not None:
        return replace_fields(
            config, lr_decay_iters=max(1, round(o.lr_decay_fraction * train_iters))
        )
    if training.train_samples is not None:
        end = min(training.train_samples, schedule.total_samples)
        return replace_fields(config, lr_decay_samples=end)
    possible, _ = BatchSizeSchedule(config).iterations(schedule.total_samples)
    return replace_fields(config, lr_decay_iters=min(training.train_iters or train_iters, possible))


def check_run_tokenizer(
    config: Config, datasets: Mapping[str, DatasetInfo], tokenizer: Tokenizer
) -> list[str]:
    """Refuse datasets of another tokenizer; return warnings if the configuration allows them.

    Raises:
        UserError: a dataset's manifest records another tokenizer.
    """
    return check_dataset_tokenizers(
        datasets, tokenizer.identity(), config.data.allow_tokenizer_mismatch
    )


def load_run_tokenizer(config: Config) -> Tokenizer | None:
    """Load the tokenizer of a run; None if it has none.

    Raises:
        UserError: it cannot be loaded.
    """
    data, ids = config.data, config.model.vocab_size
    if data.tokenizer_type is None:
        return None
    # NullTokenizer's size excludes its EOD; the model's vocabulary includes it.
    size = ids - 1 if ids and data.tokenizer_type == "NullTokenizer" else ids
    return load_tokenizer(
        data.tokenizer_type,
        data.tokenizer_model,
        vocab_size=size,
        merge_file=data.merge_file,
        tiktoken=TikTokenSettings(
            data.tiktoken_pattern,
            data.tiktoken_num_special_tokens,
            data.tiktoken_special_tokens,
        ),
    )


def validation_sets(
    config: Config, data: ResolvedData, train_iters: int
) -> tuple[dict[str, HeldOutDataset | MegatronBlend], list[str]]:
    """Return the validation sets by name; those in Megatron-LM's order have its sizes.

    Parts of a split without documents are omitted, with a note; megatron-core would search for
    samples in them endlessly.
    """
    training, sizes = config.training, BatchSizeSchedule(config)
    planned = planned_samples(config, sizes)
    if planned is not None:  # Megatron-LM counts the planned iterations
        train_iters = sizes.iterations(planned)[0]
    times = train_iters // training.eval_interval + 1 if training.eval_interval else 1
    once = max(1, training.eval_iters * training.global_batch_size)
    samples = {"valid": times * once, "test": once}
    found = resolve_validation(data.folds, data.datasets, samples, data.schedule.shuffle)
    notes = []
    for name, held_out in list(found.items()):
        if not isinstance(held_out, MegatronBlend):
            continue
        infos = [data.datasets[path] for path in held_out.paths]
        if not all(info.part_tokens(held_out.split, held_out.part) for info in infos):
            del found[name]
            part = f"part '{held_out.part}' of split {held_out.split}"
            notes.append(f"no validation set '{name}': a dataset has no document in {part}")
    return found, notes


def repetition_notes(schedule: Schedule) -> list[str]:
    """Return notes on datasets that Megatron-LM's order repeats."""
    return [
        f"fold '{fold.name}': {piece.samples / piece.samples_per_epoch:.2f} epochs of {piece.path}"
        for fold in schedule.folds
        if fold.megatron is not None
        for piece in fold.slices
        if piece.samples > piece.samples_per_epoch
    ]


def shuffle_notes(data: ResolvedData) -> list[str]:
    """Return a note if the size of the datasets selected the shuffling of a new run."""
    computed = any(fold.megatron is None for fold in data.schedule.folds)
    if data.folds.shuffle is not None or data.schedule.shuffle == "documents" or not computed:
        return []
    return [
        "shuffle: blocks, because the datasets have more than "
        f"{MAX_STORED_ENTRIES // 1_000_000} M documents and samples; a key of the fold file "
        "overrides it (docs/folds.md)"
    ]


def data_source_name(data: DataConfig) -> str:
    """Return the fold file or flag that names the data, for messages."""
    return data.fold_file or next(iter(given_data_flags(data)), "the fold file")


def index_cache_folder(config: Config, folds: FoldFile) -> Path:
    """Return the folder of sample indices: data_cache_path, or one next to the data.

    That is index_cache next to the fold file, or next to the first dataset.
    """
    data = config.data
    if data.data_cache_path:
        return Path(data.data_cache_path)
    return (
        Path(data.fold_file or next(iter(folds.dataset_paths()))).resolve().parent / "index_cache"
    )


def with_shortened_warmup(config: Config) -> tuple[Config, list[str]]:
    """Shorten a default warm-up that is as long as the decay or longer.

    Returns:
        The configuration, and a note where the warm-up was shortened.
    """
    o, end = config.optimizer, length_in_iterations(config, "lr_decay")
    length = length_in_iterations(config, "lr_warmup") or 0
    if not o.lr_warmup_shorten or o.lr_warmup_fraction is not None or not end or length < end:
        return config, []
    new = end // 10
    units = {"lr_warmup_samples": None, "lr_warmup_tokens": None}
    note = (
        f"warm-up: {new} iterations, a tenth of the decay's {end}, instead of the default "
        f"{length} (--lr-warmup-iters overrides it)"
    )
    return replace_fields(config, lr_warmup_iters=new, **units), [note]
