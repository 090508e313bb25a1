"""Fold file + what is on disk -> the fold schedule. Pure arithmetic, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_llmjp.data.batch_size import BatchSizeSchedule
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
from megatron_llmjp.data.folds.schema import BlendEntry, Fold, FoldFile, SplitPart
from megatron_llmjp.errors import UserError


def resolve_folds(
    file: FoldFile,
    datasets: Mapping[str, DatasetInfo],
    sequence_length: int,
    batch_sizes: BatchSizeSchedule,
) -> Schedule:
    """Turn budgets and blends into exact numbers of samples.

    Args:
        file: the fold file.
        datasets: what is known of each dataset, by path.
        sequence_length: tokens per sample.
        batch_sizes: samples per iteration, for budgets in iterations.

    Raises:
        UserError: a dataset is too small for a sample, or for its share without ``repeat``; or
            samples are skipped beyond the end.
    """
    cursors: dict[str, int] = {}
    folds: list[FoldPlan] = []
    first = 0
    for fold in file.folds:
        plan = _plan(fold, file.seed, first, datasets, sequence_length, batch_sizes, cursors)
        folds.append(plan)
        first = plan.end
    skips = SkippedSamples.of(skip.samples for skip in file.skip)
    if skips and skips.ranges[-1][1] > first:
        raise UserError(
            f"skip: samples {list(skips.ranges[-1])} reach beyond the folds' last sample "
            f"({first - 1:,}); they are counted from 0 through all folds"
        )
    return Schedule(file.seed, sequence_length, tuple(folds), skips)


def resolve_validation(
    file: FoldFile, datasets: Mapping[str, DatasetInfo], samples: Mapping[str, int]
) -> dict[str, HeldOutDataset | MegatronBlend]:
    """The validation sets by name.

    Args:
        file: the fold file.
        datasets: what is known of each dataset, by path.
        samples: how many Megatron-LM would ask for in the parts ``valid`` and ``test``; its order
            depends on it.
    """
    found: dict[str, HeldOutDataset | MegatronBlend] = {}
    for name, held_out in file.validation.items():
        if held_out.blend is not None:
            infos = [datasets[source.path] for source in held_out.blend.values()]
            part, split = held_out.part, held_out.split
            found[name] = _blend(held_out.blend, infos, split, part, samples[part], file.seed)
        elif held_out.path is not None:
            key = datasets[held_out.path].key
            found[name] = HeldOutDataset(held_out.path, key, epoch_seed(file.seed, key, 0))
    return found


def _plan(
    fold: Fold,
    seed: int,
    first: int,
    datasets: Mapping[str, DatasetInfo],
    length: int,
    batch_sizes: BatchSizeSchedule,
    cursors: dict[str, int],
) -> FoldPlan:
    """Place one fold at position ``first``; ``cursors`` move to where its slices end."""
    infos = {name: datasets[source.path] for name, source in fold.blend.items()}
    per_epoch = {name: i.samples_per_epoch(length, fold.split) for name, i in infos.items()}
    for name, source in fold.blend.items():
        if per_epoch[name] < 1:
            raise UserError(
                f"fold '{fold.name}', dataset '{name}': {source.path} has fewer tokens than one "
                "sample: shorten seq_length or leave the dataset out"
            )
    counts = samples_per_dataset(
        fold, per_epoch, length, fold_budget(fold, first, length, batch_sizes)
    )
    if fold.order == "megatron" and fold.kind is None and len(counts) > 1:
        _check_whole(fold, sum(counts), sum(per_epoch.values()))
    slices = []
    for (name, source), samples in zip(fold.blend.items(), counts, strict=True):
        key, epoch = infos[name].key, per_epoch[name]
        start = cursors.get(key, 0)
        if source.restart or fold.order == "megatron":
            start = -(-start // epoch) * epoch
        checksums = infos[name].checksums
        piece = DatasetSlice(
            name, source.path, key, start, samples, epoch, _asked(source), checksums
        )
        _check_repetition(fold, source, piece)
        cursors[key] = piece.end
        if fold.order == "megatron":  # its order is another one: nothing can go on within its epoch
            cursors[key] = -(-piece.end // epoch) * epoch
        slices.append(piece)
    total = sum(counts)
    blend = None
    if fold.order == "megatron":
        blend = _blend(fold.blend, infos.values(), fold.split, "train", total, seed)
    return FoldPlan(
        name=fold.name,
        first_sample=first,
        samples=total,
        slices=tuple(slices),
        digest=_digest(seed, length, fold.name, first, slices, blend),
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


def _asked(source: BlendEntry) -> str:
    amount = source.amount
    return f"{amount[0]} {amount[1]:g}" if amount else ""


def _check_repetition(fold: Fold, source: BlendEntry, piece: DatasetSlice) -> None:
    """More than one epoch must be asked for."""
    asked = source.repeat or (source.epochs or fold.epochs or 0) > 1
    allowed = piece.samples_per_epoch + (piece.start if source.restart else 0)
    if piece.end > allowed and not asked:
        raise UserError(
            f"fold '{fold.name}', dataset '{piece.name}': up to here the run needs "
            f"{piece.end / piece.samples_per_epoch:.2f} epochs of {source.path} "
            f"({piece.end:,} samples of {piece.samples_per_epoch:,}): lower the fold's share, or "
            "write `repeat: true` to allow more than one epoch"
        )


def _check_whole(fold: Fold, asked: int, possible: int) -> None:
    """Without weights Megatron-LM builds one epoch of each dataset and would end there."""
    if asked > possible:
        raise UserError(
            f"fold '{fold.name}': {asked:,} samples are asked for, but without weights Megatron-LM "
            f"has one epoch of its datasets, {possible:,} samples: give weights, or ask for less"
        )


def _digest(
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
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
