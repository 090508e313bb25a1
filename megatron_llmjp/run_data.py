"""The data of a run, resolved: schedule, number of iterations, validation sets. Without torch."""

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
from megatron_llmjp.data.folds.resolve import resolve_folds, resolve_validation
from megatron_llmjp.data.folds.schedule import DatasetInfo, HeldOutDataset, MegatronBlend, Schedule
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.data.lr_schedule import length_in_iterations
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer, load_tokenizer
from megatron_llmjp.tokenizers.registry import TikTokenSettings


@dataclass(frozen=True)
class ResolvedData:
    """The data of a run, resolved."""

    folds: FoldFile
    datasets: dict[str, DatasetInfo]
    """What is known of each dataset, by path."""
    schedule: Schedule


def resolve_data(config: Config) -> ResolvedData:
    """Resolve the data of a run; of the model and the layout nothing need be known.

    Raises:
        UserError: whatever is wrong with the fold file or a dataset.
    """
    batch_sizes, length = BatchSizeSchedule(config), config.data.seq_length
    if given_data_flags(config.data):
        samples = planned_samples(config, batch_sizes)
        folds = fold_file_from_flags(config.data, samples, config.training.seed)
    elif config.data.fold_file is None:
        raise UserError(
            "no data: give --fold-file, the file that declares the folds of the run, or "
            "--data-path as for Megatron-LM"
        )
    else:
        folds = read_fold_file(Path(config.data.fold_file))
    if folds.sequence_length not in (None, length):
        raise UserError(
            f"{config.data.fold_file}: sequence_length {folds.sequence_length} differs from the "
            f"run's seq_length {length}: take one of them away"
        )
    datasets = inspect_datasets(folds, index_cache_folder(config, folds))
    return ResolvedData(folds, datasets, resolve_folds(folds, datasets, length, batch_sizes))


def with_stored_keys(
    data: ResolvedData, config: Config, records: Mapping[str, FoldFingerprint]
) -> ResolvedData:
    """Return the data under the keys by which a checkpoint knows its datasets.

    Args:
        data: as resolved without the checkpoint.
        config: the run's.
        records: the folds that the checkpoint was trained on, by name.
    """
    blends = {fold.name: fold.blend for fold in data.folds.folds}
    known = [
        (dataset.key, blends[name][dataset_name].path)
        for name, record in records.items()
        for dataset_name, dataset in (record.datasets or {}).items()
        if dataset_name in blends.get(name, {})
    ]
    found = _resolved_again(data, config, fold_datasets.with_recorded_keys(data.datasets, known))
    if all(record.datasets is not None for record in records.values()):
        return found
    # The digests of such folds are all that the checkpoint remembers.
    earlier = _resolved_again(data, config, fold_datasets.with_legacy_keys(data.datasets))
    digests = {record.digest for record in records.values()}
    return earlier if digests & {fold.digest for fold in earlier.schedule.folds} else found


def _resolved_again(
    data: ResolvedData, config: Config, datasets: dict[str, DatasetInfo]
) -> ResolvedData:
    if datasets == data.datasets:
        return data
    length, sizes = config.data.seq_length, BatchSizeSchedule(config)
    return ResolvedData(data.folds, datasets, resolve_folds(data.folds, datasets, length, sizes))


def train_iterations(config: Config, schedule: Schedule) -> tuple[int, list[str]]:
    """Iterations of the run: the schedule's, unless a limit is reached first; and notes on its end.

    Raises:
        UserError: there is not one full batch, or the limits need more samples than the folds have.
    """
    batch_sizes, where = BatchSizeSchedule(config), data_source_name(config.data)
    possible, rest = batch_sizes.iterations(schedule.total_samples)
    if possible == 0:
        raise UserError(
            f"{where}: its {schedule.total_samples} samples are less than one global batch of "
            f"{batch_sizes.at(0)}: enlarge the folds or lower global_batch_size"
        )
    found = run_limits(config, batch_sizes)
    if not found:
        note = f"{rest} samples at the end make no full batch and are left out"
        return possible, [note] if rest else []
    first = found[0]
    if first.iteration == 0:
        raise UserError(f"{first} is less than one global batch of {batch_sizes.at(0)}: raise it")
    if first.samples <= schedule.total_samples:
        return min(first.iteration, possible), _which_ends(found, possible)
    if first.samples <= schedule.total_positions:
        return possible, [
            f"the run ends at iteration {possible:,}, not with {first} at iteration "
            f"{first.iteration:,}: samples are skipped"
        ]
    raise UserError(
        f"{first.name} {first.value} needs {first.samples:,} samples, but the folds of {where} "
        f"hold {schedule.total_samples:,}, enough for {possible} iterations: leave {first.name} "
        "out, or give the folds more tokens"
    )


def _which_ends(found: list[RunLimit], possible: int) -> list[str]:
    """A note on which of several limits ends the run; none where it says nothing new."""
    first, *others = found
    later = [f"{limit} (iteration {limit.iteration:,})" for limit in others]
    if first.iteration < possible:
        later.append(f"the folds (iteration {possible:,})")
    if not later:
        return []
    end = min(first.iteration, possible)
    return [f"{first} ends the run at iteration {end:,}, before {' and '.join(later)}"]


def with_decay_length(config: Config, schedule: Schedule, train_iters: int) -> Config:
    """Fix where the learning rate's decay ends, so that folds added later do not move it.

    Where nothing is given it ends as in Megatron-LM: with train_samples or train_iters, also if
    train_tokens ends the run earlier.
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
    """Refuse datasets of another tokenizer, or warn where the configuration allows them.

    Raises:
        UserError: a dataset's manifest records another tokenizer.
    """
    return check_dataset_tokenizers(
        datasets, tokenizer.identity(), config.data.allow_tokenizer_mismatch
    )


def load_run_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of a run; None if it names none.

    Raises:
        UserError: it cannot be loaded.
    """
    data, ids = config.data, config.model.vocab_size
    if data.tokenizer_type is None:
        return None
    # NullTokenizer counts the ids below its EOD; the model's vocabulary counts that too.
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
    """The validation sets by name, those in Megatron-LM's order as large as it would make them.

    Parts of a split that hold no document are left out, with a note; megatron-core would look for
    samples in them for ever.
    """
    training, sizes = config.training, BatchSizeSchedule(config)
    planned = planned_samples(config, sizes)
    if planned is not None:  # Megatron-LM counts the iterations of the run as it was planned
        train_iters = sizes.iterations(planned)[0]
    times = train_iters // training.eval_interval + 1 if training.eval_interval else 1
    once = max(1, training.eval_iters * training.global_batch_size)
    samples = {"valid": times * once, "test": once}
    found = resolve_validation(data.folds, data.datasets, samples)
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
    """Notes on what Megatron-LM repeats without being asked."""
    return [
        f"fold '{fold.name}': {piece.samples / piece.samples_per_epoch:.2f} epochs of {piece.path}"
        for fold in schedule.folds
        if fold.megatron is not None
        for piece in fold.slices
        if piece.samples > piece.samples_per_epoch
    ]


def data_source_name(data: DataConfig) -> str:
    """What the user named the data with: the fold file, or a flag."""
    return data.fold_file or next(iter(given_data_flags(data)), "the fold file")


def index_cache_folder(config: Config, folds: FoldFile) -> Path:
    """Folder of sample indices: the one asked for, or one beside the fold file or first dataset."""
    data = config.data
    if data.data_cache_path:
        return Path(data.data_cache_path)
    return (
        Path(data.fold_file or next(iter(folds.dataset_paths()))).resolve().parent / "index_cache"
    )


def with_shortened_warmup(config: Config) -> tuple[Config, list[str]]:
    """Shorten a default warm-up that leaves nothing of the decay, which is fixed already.

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
        f"warm-up: {new} iterations, a tenth of the decay's {end}, in place of the default "
        f"{length} (--lr-warmup-iters sets another)"
    )
    return replace_fields(config, lr_warmup_iters=new, **units), [note]
