"""Resolution of a fold file and dataset facts into the fold schedule; does not import torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.block_tokens import SEQUENCES_PER_BLOCK
from megatron_llmjp.data.folds.schedule import (
    DatasetInfo,
    DatasetSlice,
    FoldPlan,
    HeldOutDataset,
    MegatronBlend,
    Schedule,
    SkippedSamples,
    epoch_seed,
    fold_budget,
    samples_per_dataset,
)
from megatron_llmjp.data.folds.schema import BlendEntry, Fold, FoldFile, Shuffle, SplitPart
from megatron_llmjp.errors import UserError

MAX_STORED_ENTRIES = 10_000_000
"""Documents and samples of all datasets up to which `shuffle: documents` is the default: its
indices take about two seconds to build."""


def resolve_folds(
    file: FoldFile,
    datasets: Mapping[str, DatasetInfo],
    sequence_length: int,
    batch_sizes: BatchSizeSchedule,
) -> Schedule:
    """Convert budgets and blends to exact numbers of samples.

    Args:
        file: the fold file.
        datasets: dataset facts by path.
        sequence_length: tokens per sample.
        batch_sizes: samples per iteration, for budgets in iterations.

    Raises:
        UserError: a dataset has less than one sample, or would be repeated without ``repeat``; or
            ``skip`` exceeds the end of the folds.
    """
    cursors: dict[str, int] = {}
    folds: list[FoldPlan] = []
    first = 0
    shuffle = file.shuffle or default_shuffle(datasets.values(), sequence_length)
    for fold in file.folds:
        plan = _plan_fold(fold, file.seed, first, datasets, sequence_length, batch_sizes, cursors)
        if shuffle != "documents" and plan.megatron is None:
            plan = replace(plan, digest=_digest([plan.digest, "shuffle", shuffle]))
        folds.append(plan)
        first = plan.end
    skips = SkippedSamples.of(skip.samples for skip in file.skip)
    if skips and skips.ranges[-1][1] > first:
        raise UserError(
            f"skip: samples {list(skips.ranges[-1])} exceed the last sample of the folds "
            f"({first - 1:,}); samples are numbered from 0 through all folds"
        )
    return Schedule(file.seed, sequence_length, tuple(folds), skips, shuffle)


def default_shuffle(datasets: Iterable[DatasetInfo], sequence_length: int) -> Shuffle:
    """Return ``blocks`` for datasets whose stored indices would take more than seconds to build.

    Facts without block counts, as assumed for missing datasets, are not counted.
    """
    entries = sum(
        len(info.block_tokens) * SEQUENCES_PER_BLOCK + info.tokens // sequence_length
        for info in datasets
        if info.block_tokens is not None
    )
    return "blocks" if entries > MAX_STORED_ENTRIES else "documents"


def resolve_validation(
    file: FoldFile,
    datasets: Mapping[str, DatasetInfo],
    samples: Mapping[str, int],
    shuffle: Shuffle,
) -> dict[str, HeldOutDataset | MegatronBlend]:
    """Return the validation sets by name.

    Args:
        file: the fold file.
        datasets: dataset facts by path.
        samples: number of samples that Megatron-LM would request of the parts ``valid`` and
            ``test``, on which its order depends.
        shuffle: shuffling of the held-out datasets.
    """
    found: dict[str, HeldOutDataset | MegatronBlend] = {}
    for name, held_out in file.validation.items():
        if held_out.blend is not None:
            infos = [datasets[source.path] for source in held_out.blend.values()]
            part, split = held_out.part, held_out.split
            found[name] = _blend(held_out.blend, infos, split, part, samples[part], file.seed)
        elif held_out.path is not None:
            key = datasets[held_out.path].key
            seed = epoch_seed(file.seed, key, 0)
            found[name] = HeldOutDataset(held_out.path, key, seed, shuffle)
    return found


def _plan_fold(
    fold: Fold,
    seed: int,
    first: int,
    datasets: Mapping[str, DatasetInfo],
    length: int,
    batch_sizes: BatchSizeSchedule,
    cursors: dict[str, int],
) -> FoldPlan:
    """Place one fold at position ``first`` and advance ``cursors`` to the ends of its slices."""
    infos = {name: datasets[source.path] for name, source in fold.blend.items()}
    per_epoch = {name: i.samples_per_epoch(length, fold.split) for name, i in infos.items()}
    for name, source in fold.blend.items():
        if per_epoch[name] < 1:
            raise UserError(
                f"fold '{fold.name}', dataset '{name}': {source.path} has fewer tokens than one "
                "sample: reduce seq_length or remove the dataset"
            )
    counts = samples_per_dataset(
        fold, per_epoch, length, fold_budget(fold, first, length, batch_sizes)
    )
    if fold.order == "megatron" and fold.kind is None and len(counts) > 1:
        _check_one_epoch(fold, sum(counts), sum(per_epoch.values()))
    slices = []
    for (name, source), samples in zip(fold.blend.items(), counts, strict=True):
        key, epoch = infos[name].key, per_epoch[name]
        start = cursors.get(key, 0)
        if source.restart or fold.order == "megatron":
            start = -(-start // epoch) * epoch
        checksums = infos[name].checksums
        dataset_slice = DatasetSlice(
            name, source.path, key, start, samples, epoch, _describe_amount(source), checksums
        )
        _check_repetition(fold, source, dataset_slice)
        cursors[key] = dataset_slice.end
        if fold.order == "megatron":  # a partial epoch cannot be continued in another order
            cursors[key] = -(-dataset_slice.end // epoch) * epoch
        slices.append(dataset_slice)
    total = sum(counts)
    blend = None
    if fold.order == "megatron":
        blend = _blend(fold.blend, infos.values(), fold.split, "train", total, seed)
    return FoldPlan(
        name=fold.name,
        first_sample=first,
        samples=total,
        slices=tuple(slices),
        digest=_fold_digest(seed, length, fold.name, first, slices, blend),
        learning_rate=fold.learning_rate,
        megatron=blend,
    )


def _blend(
    blend: Mapping[str, BlendEntry],
    infos: Iterable[DatasetInfo],
    split: str | None,
    part: SplitPart,
    samples: int,
    seed: int,
) -> MegatronBlend:
    weights = [source.weight for source in blend.values() if source.weight is not None]
    return MegatronBlend(
        paths=tuple(source.path for source in blend.values()),
        keys=tuple(info.key for info in infos),
        weights=tuple(weights) or None,
        split=split,
        part=part,
        samples=samples,
        seed=seed,
    )


def _describe_amount(source: BlendEntry) -> str:
    amount = source.amount
    return f"{amount[0]} {amount[1]:g}" if amount else ""


def _check_repetition(fold: Fold, source: BlendEntry, dataset_slice: DatasetSlice) -> None:
    """Raise UserError if a dataset is repeated but the fold file does not request it."""
    requested = source.repeat or (source.epochs or fold.epochs or 0) > 1
    allowed = dataset_slice.samples_per_epoch + (dataset_slice.start if source.restart else 0)
    if dataset_slice.end > allowed and not requested:
        epochs = dataset_slice.end / dataset_slice.samples_per_epoch
        raise UserError(
            f"fold '{fold.name}', dataset '{dataset_slice.name}': up to this fold the run needs "
            f"{epochs:.2f} epochs of {source.path} ({dataset_slice.end:,} samples of "
            f"{dataset_slice.samples_per_epoch:,}): reduce its share, or add `repeat: true` to "
            "allow more than one epoch"
        )


def _check_one_epoch(fold: Fold, requested: int, possible: int) -> None:
    """Raise UserError for more samples than one epoch: Megatron-LM's limit without weights."""
    if requested > possible:
        raise UserError(
            f"fold '{fold.name}': {requested:,} samples are requested, but without weights "
            f"Megatron-LM uses one epoch of its datasets, {possible:,} samples: give weights, or "
            "request fewer samples"
        )


def _fold_digest(
    seed: int,
    length: int,
    name: str,
    first: int,
    slices: list[DatasetSlice],
    blend: MegatronBlend | None,
) -> str:
    content: list[Any] = [seed, length, name, first]
    content.append([[s.key, s.start, s.samples] for s in slices])
    if blend is not None:
        content.append(["megatron", blend.weights, blend.split, blend.samples])
    return _digest(content)


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
