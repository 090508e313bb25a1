"""The fold schedule: budgets, shares, skipped samples, and the folds in order.

Samples to leave out: numbers of positions, and of the samples that remain between them.

A *position* is a sample's number in the schedule; it depends on the fold file and its seed alone.
Leaving samples out moves no position: it only decides which position the next step trains on.

Budgets and blends -> whole numbers of samples. Pure arithmetic.

The fold schedule: folds in order, what each draws from which dataset, and how many samples.

Pure arithmetic, without torch. A run's data is a function ``sample(position)`` for positions in
``[0, total_positions)``. A dataset is a stream of its epochs end to end, each epoch shuffled with a
seed of its own; a fold takes the next slice of each of its datasets' streams. Hence a dataset that
recurs in a later fold goes on where it stopped, and a change to a later fold moves nothing before.

Positions that are skipped stay where they are: trained sample ``k`` is the k-th that is not.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.fingerprint import DatasetFingerprint, FoldFingerprint
from megatron_llmjp.data.folds.schema import Fold, FoldLearningRate, SplitPart
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class SkippedSamples:
    """Positions left out, as half-open ranges in order that neither touch nor overlap."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> SkippedSamples:
        """Sort ranges and join those that touch or overlap; empty ones vanish."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted((a, b) for a, b in ranges if a < b):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], end))
            else:
                joined.append((start, end))
        return cls(tuple(joined))

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def union(self, ranges: Iterable[tuple[int, int]]) -> SkippedSamples:
        """These and more."""
        return SkippedSamples.of([*self.ranges, *ranges])

    def position(self, number: int) -> int:
        """The position of trained sample ``number``: that of this number among those kept."""
        position = number
        for start, end in self.ranges:
            if start > position:
                break
            position += end - start
        return position

    def kept_before(self, position: int) -> int:
        """How many positions below ``position`` are kept; the inverse of :meth:`position`."""
        return position - sum(max(0, min(b, position) - a) for a, b in self.ranges)

    def kept(self, start: int, end: int) -> int:
        """How many of the positions ``[start, end)`` are kept."""
        return max(0, self.kept_before(end) - self.kept_before(start))

    def before(self, position: int) -> SkippedSamples:
        """The part of them below ``position``."""
        return SkippedSamples.of((a, min(b, position)) for a, b in self.ranges)


NO_SKIPPED_SAMPLES = SkippedSamples()


def apportion(total: int, weights: list[float]) -> list[int]:
    """Split ``total`` in proportion to ``weights`` into integers that sum to it exactly.

    Largest remainder (Hamilton's method), with the weights as they are written: 0.1 is a tenth.
    Ties go to the earlier entry.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    whole = sum(exact)
    quotas = [total * weight / whole for weight in exact]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def samples_per_dataset(
    fold: Fold, per_epoch: Mapping[str, int], sequence_length: int, budget: int | None
) -> list[int]:
    """Samples that a fold draws from each dataset of its blend, in the blend's order.

    Args:
        fold: the fold.
        per_epoch: samples of one epoch of each dataset, by its name in the blend.
        sequence_length: tokens per sample.
        budget: what :func:`fold_budget` says.

    Raises:
        UserError: the budget is less than one sample.
    """
    kind = fold.kind
    if budget is None and kind in (None, "epochs"):
        times = {name: source.epochs or fold.epochs or 1 for name, source in fold.blend.items()}
        return [max(1, round(times[name] * per_epoch[name])) for name in fold.blend]
    if kind is None:  # Megatron's order: the datasets' sizes are their weights
        amounts = [float(per_epoch[name]) for name in fold.blend]
    else:
        amounts = [source.amount[1] for source in fold.blend.values() if source.amount]
    total = budget if budget is not None else int(sum(amounts) // sequence_length)
    if total < 1:
        raise UserError(
            f"fold '{fold.name}': its budget is less than one sample of {sequence_length} tokens"
        )
    return apportion(total, amounts)


def fold_budget(
    fold: Fold, first: int, sequence_length: int, batch_sizes: BatchSizeSchedule
) -> int | None:
    """Samples of a fold that begins at position ``first``; None where its datasets decide.

    Iterations have the sizes of those that follow position ``first``, so that a fold of N
    iterations during a batch ramp-up is N iterations long. Samples that are skipped do not count:
    they must not move any position.
    """
    if fold.samples is not None:
        return fold.samples
    if fold.tokens is not None:
        return int(fold.tokens // sequence_length)
    if fold.iterations is not None:
        begun, _ = batch_sizes.iterations(first)
        return batch_sizes.consumed_after(begun + fold.iterations) - batch_sizes.consumed_after(
            begun
        )
    return None


@dataclass(frozen=True)
class DatasetInfo:
    """What the schedule needs to know of a dataset on disk."""

    key: str
    """Digest of its contents: the dataset's identity, wherever it lies."""
    tokens: int
    parts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Tokens of the parts of Megatron-LM's ``--split``, by ``(split, part)``, where they matter."""
    stamp: str = field(default="", compare=False)
    """Of its files when this was found out (``data/folds/datasets.py``)."""
    legacy_key: str = ""
    """Its key in earlier versions, where that is another one (``data/folds/datasets.py``)."""
    checksums: str = ""
    """Of its files, as its manifest states them; no part of its identity."""
    largest_id: int | None = None
    """The largest token id in the parts of the file that were read; None if nothing was read."""

    def samples_per_epoch(self, sequence_length: int, split: str | None = None) -> int:
        """Samples of one epoch: each needs one more token than its length, shared with the next.

        With ``split`` of its training part.
        """
        return max(0, (self.part_tokens(split, "train") - 1) // sequence_length)

    def part_tokens(self, split: str | None, part: SplitPart) -> int:
        """Tokens of one part of a split; of the whole where it is not split."""
        return self.tokens if split is None else self.parts[split, part]


@dataclass(frozen=True)
class DatasetSlice:
    """What one fold draws from one dataset: samples ``[start, start + samples)`` of its stream.

    In Megatron-LM's order the number of samples is the dataset's share, which Megatron-LM keeps
    to within a few samples.
    """

    name: str
    path: str
    key: str
    start: int
    samples: int
    samples_per_epoch: int
    asked: str = ""
    """The amount in the fold file, such as ``weight 3``."""
    checksums: str = ""
    """Of the dataset's files, as its manifest states them."""

    @property
    def end(self) -> int:
        """Sample of the stream after the last."""
        return self.start + self.samples

    @property
    def last_epoch(self) -> int:
        """Number of the last epoch touched, from 0."""
        return (self.end - 1) // self.samples_per_epoch


@dataclass(frozen=True)
class MegatronBlend:
    """What Megatron-LM is to be asked for: a blend in its own order."""

    paths: tuple[str, ...]
    keys: tuple[str, ...]
    """Digests of the datasets' contents."""
    weights: tuple[float, ...] | None
    """None: in proportion to the datasets' sizes, one epoch of each at most."""
    split: str | None
    """Megatron-LM's ``--split``; None where the blend is one part whole."""
    part: SplitPart
    samples: int
    seed: int


@dataclass(frozen=True)
class HeldOutDataset:
    """A dataset to validate on, in the order of one shuffled epoch."""

    path: str
    key: str
    seed: int


@dataclass(frozen=True)
class FoldPlan:
    """A fold with its place in the run."""

    name: str
    first_sample: int
    """Position of the first sample."""
    samples: int
    """Positions of the fold, those that are skipped included."""
    slices: tuple[DatasetSlice, ...]
    digest: str
    """Of everything that decides this fold's order."""
    learning_rate: FoldLearningRate | None = None
    megatron: MegatronBlend | None = None
    """What to ask Megatron-LM's builder for, where the fold is in its order."""

    def __hash__(self) -> int:
        return hash(self.digest)  # looked up for every sample: not all slices each time

    @property
    def end(self) -> int:
        """Position after the fold's last."""
        return self.first_sample + self.samples

    @property
    def order(self) -> str:
        """``folds`` or ``megatron``."""
        return "folds" if self.megatron is None else "megatron"


@dataclass(frozen=True)
class Schedule:
    """The whole run's data."""

    seed: int
    sequence_length: int
    folds: tuple[FoldPlan, ...]
    skips: SkippedSamples = NO_SKIPPED_SAMPLES

    @property
    def total_positions(self) -> int:
        """Samples in all folds, those that are skipped included."""
        return self.folds[-1].end

    @property
    def total_samples(self) -> int:
        """Samples that can be trained on."""
        return self.skips.kept_before(self.total_positions)

    def position(self, number: int) -> int:
        """The position of trained sample ``number``."""
        return self.skips.position(number)

    def consumed_end(self, consumed_samples: int) -> int:
        """The position after the last one that was trained on: all before it is the past."""
        return self.position(consumed_samples - 1) + 1 if consumed_samples > 0 else 0

    def fold_of_sample(self, number: int) -> FoldPlan:
        """The fold that holds trained sample ``number``; the last one for the end of the run."""
        return self.fold_at_position(self.position(number))

    def fold_at_position(self, position: int) -> FoldPlan:
        """The fold that holds a position; the last one for the end of the schedule."""
        place = bisect.bisect_right(self.folds, position, key=lambda fold: fold.end)
        return self.folds[min(place, len(self.folds) - 1)]

    def sample_range(self, fold: FoldPlan) -> tuple[int, int]:
        """The first trained sample of a fold, and the one after its last."""
        return self.skips.kept_before(fold.first_sample), self.skips.kept_before(fold.end)

    def consumed_folds(self, consumed_samples: int) -> dict[str, FoldFingerprint]:
        """What a checkpoint remembers of every fold that is wholly or partly past, by name."""
        end = self.consumed_end(consumed_samples)
        return {fold.name: self.record(fold) for fold in self.folds if fold.first_sample < end}

    def consumed_by_dataset(self, consumed_samples: int) -> dict[tuple[str, str], int]:
        """Samples trained on, by ``(fold, dataset)``, of all folds touched.

        Exact for a fold that is complete. Of one that is under way, or of which samples are
        skipped, each dataset has its share: the datasets are interleaved so that every part of a
        fold keeps to its blend, within as many samples as there are datasets.
        """
        end = self.consumed_end(consumed_samples)
        counts: dict[tuple[str, str], int] = {}
        for fold in self.folds:
            if fold.first_sample >= end:
                break
            trained = self.skips.kept(fold.first_sample, min(end, fold.end))
            shares = apportion(trained, [float(piece.samples) for piece in fold.slices])
            for piece, share in zip(fold.slices, shares, strict=True):
                counts[fold.name, piece.name] = share
        return counts

    def record(self, fold: FoldPlan) -> FoldFingerprint:
        """What a checkpoint remembers of a fold."""
        return FoldFingerprint(
            digest=fold.digest,
            seed=self.seed,
            sequence_length=self.sequence_length,
            first_sample=fold.first_sample,
            samples=fold.samples,
            order=fold.order,
            split=fold.megatron.split if fold.megatron else None,
            datasets={
                piece.name: DatasetFingerprint(
                    path=piece.path,
                    key=piece.key,
                    asked=piece.asked,
                    start=piece.start,
                    samples=piece.samples,
                    checksums=piece.checksums,
                )
                for piece in fold.slices
            },
        )

    def with_skips(self, skips: SkippedSamples) -> Schedule:
        """The same schedule with other samples left out."""
        return replace(self, skips=skips)


def epoch_seed(seed: int, key: str, epoch: int) -> int:
    """Seed of one epoch of one dataset, below 2^32."""
    digest = hashlib.sha256(f"{seed}/{key}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
