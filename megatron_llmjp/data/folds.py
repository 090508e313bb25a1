"""The fold schedule: folds in order, what each draws from which dataset, and how many samples.

Pure arithmetic, without torch. A run's data is a function ``sample(i)`` for i in
``[0, total_samples)``. A dataset is a stream of its epochs end to end, each epoch shuffled with a
seed of its own; a fold takes the next slice of each of its datasets' streams. Hence a dataset that
recurs in a later fold goes on where it stopped, and a change to a later fold moves nothing before.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_llmjp.data.fold_file import Fold, FoldFile, Source
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class DatasetInfo:
    """What the schedule needs to know of a dataset on disk."""

    key: str
    """Digest of its contents: the dataset's identity, wherever it lies."""
    tokens: int

    def samples_per_epoch(self, sequence_length: int) -> int:
        """Samples of one epoch: each needs one more token than its length, shared with the next."""
        return max(0, (self.tokens - 1) // sequence_length)


@dataclass(frozen=True)
class Slice:
    """What one fold draws from one dataset: samples ``[start, start + samples)`` of its stream."""

    name: str
    path: str
    key: str
    start: int
    samples: int
    samples_per_epoch: int

    @property
    def last_epoch(self) -> int:
        """Number of the last epoch touched, from 0."""
        return (self.start + self.samples - 1) // self.samples_per_epoch


@dataclass(frozen=True)
class FoldPlan:
    """A fold with its place in the run."""

    name: str
    first_sample: int
    samples: int
    slices: tuple[Slice, ...]
    digest: str
    """Of everything that decides this fold's order."""

    @property
    def end(self) -> int:
        """Sample after the fold's last."""
        return self.first_sample + self.samples


@dataclass(frozen=True)
class Schedule:
    """The whole run's data."""

    seed: int
    sequence_length: int
    folds: tuple[FoldPlan, ...]

    @property
    def total_samples(self) -> int:
        """Samples in all folds."""
        return self.folds[-1].end

    def fold_at(self, sample: int) -> FoldPlan:
        """The fold that holds a sample; the last one for the end of the run."""
        ends = [fold.end for fold in self.folds]
        return self.folds[min(bisect.bisect_right(ends, sample), len(ends) - 1)]

    def touched(self, consumed_samples: int) -> dict[str, str]:
        """Digest of every fold of which samples were consumed, by name."""
        return {f.name: f.digest for f in self.folds if f.first_sample < consumed_samples}


def resolve(
    file: FoldFile,
    datasets: Mapping[str, DatasetInfo],
    sequence_length: int,
    global_batch_size: int,
) -> Schedule:
    """Turn budgets and blends into exact numbers of samples.

    Args:
        file: the fold file.
        datasets: what is known of each dataset, by path.
        sequence_length: tokens per sample.
        global_batch_size: samples per iteration, for budgets in iterations.

    Raises:
        UserError: a dataset is too small for a sample, or for its share without ``repeat``.
    """
    cursors: dict[str, int] = {}
    folds: list[FoldPlan] = []
    first = 0
    for fold in file.folds:
        counts = _samples(fold, datasets, sequence_length, global_batch_size)
        slices = []
        for (name, source), samples in zip(fold.blend.items(), counts, strict=True):
            info = datasets[source.path]
            start = cursors.get(info.key, 0)
            per_epoch = info.samples_per_epoch(sequence_length)
            piece = Slice(name, source.path, info.key, start, samples, per_epoch)
            _check_repetition(fold, source, piece)
            cursors[info.key] = start + samples
            slices.append(piece)
        digest = _digest(file.seed, sequence_length, fold.name, first, slices)
        folds.append(FoldPlan(fold.name, first, sum(counts), tuple(slices), digest))
        first += sum(counts)
    return Schedule(file.seed, sequence_length, tuple(folds))


def apportion(total: int, weights: list[float]) -> list[int]:
    """Split ``total`` in proportion to ``weights`` into integers that sum to it exactly.

    Largest remainder (Hamilton's method); ties go to the earlier entry.
    """
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def epoch_seed(seed: int, key: str, epoch: int) -> int:
    """Seed of one epoch of one dataset, below 2^32."""
    digest = hashlib.sha256(f"{seed}/{key}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _samples(
    fold: Fold, datasets: Mapping[str, DatasetInfo], sequence_length: int, batch: int
) -> list[int]:
    sources = list(fold.blend.values())
    per_epoch = [datasets[s.path].samples_per_epoch(sequence_length) for s in sources]
    if fold.epochs is not None or (sources[0].amount or ("",))[0] == "epochs":
        pairs = zip(sources, per_epoch, strict=True)
        return [max(1, round((source.epochs or fold.epochs or 1) * n)) for source, n in pairs]
    amounts = [source.amount[1] for source in sources if source.amount]
    if fold.iterations is not None:
        budget = fold.iterations * batch
    else:
        budget = int((fold.tokens or sum(amounts)) // sequence_length)
    if budget < 1:
        raise UserError(
            f"fold '{fold.name}': its budget is less than one sample of {sequence_length} tokens"
        )
    return apportion(budget, amounts)


def _check_repetition(fold: Fold, source: Source, piece: Slice) -> None:
    where = f"fold '{fold.name}', dataset '{piece.name}'"
    if piece.samples_per_epoch < 1:
        raise UserError(
            f"{where}: {source.path} has fewer tokens than one sample: shorten seq_length or leave "
            "the dataset out"
        )
    end = piece.start + piece.samples
    if end > piece.samples_per_epoch and not source.repeat and (source.epochs or 0) <= 1:
        epochs = end / piece.samples_per_epoch
        raise UserError(
            f"{where}: up to here the run needs {epochs:.2f} epochs of {source.path} "
            f"({end:,} samples of {piece.samples_per_epoch:,}): lower the fold's share, or write "
            "`repeat: true` to allow more than one epoch"
        )


def _digest(seed: int, length: int, name: str, first: int, slices: list[Slice]) -> str:
    content = [seed, length, name, first, [[s.key, s.start, s.samples] for s in slices]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
