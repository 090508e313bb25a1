"""The fold schedule: folds in order, the samples each draws from each dataset, and skipped samples.

Pure arithmetic; does not import torch. The training data is a function ``sample(position)`` for
positions in ``[0, total_positions)``. A *position* is a sample's number in the schedule and depends
only on the fold file and its seed. A dataset is a stream of its concatenated epochs, each shuffled
with its own seed; a fold takes the next slice of the stream of each of its datasets. A dataset that
recurs in a later fold therefore continues where it stopped, and changing a later fold does not move
earlier samples.

Skipping samples does not change positions: trained sample ``k`` is the k-th position that is not
skipped.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.block_tokens import BlockTokens
from megatron_llmjp.data.folds.even_interleave import EvenInterleave
from megatron_llmjp.data.folds.fingerprint import DatasetFingerprint, FoldFingerprint
from megatron_llmjp.data.folds.schema import Fold, FoldLearningRate, Shuffle, SplitPart
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class SkippedSamples:
    """Skipped positions, as sorted half-open ranges that neither touch nor overlap."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> SkippedSamples:
        """Sort ranges, merge those that touch or overlap, and drop empty ones."""
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
        """Return these positions and those in ``ranges``."""
        return SkippedSamples.of([*self.ranges, *ranges])

    def position(self, number: int) -> int:
        """Return the position of trained sample ``number``."""
        position = number
        for start, end in self.ranges:
            if start > position:
                break
            position += end - start
        return position

    def kept_before(self, position: int) -> int:
        """Count the positions below ``position`` that are not skipped; inverts :meth:`position`."""
        return position - sum(max(0, min(b, position) - a) for a, b in self.ranges)

    def kept(self, start: int, end: int) -> int:
        """Count the positions in ``[start, end)`` that are not skipped."""
        return max(0, self.kept_before(end) - self.kept_before(start))

    def before(self, position: int) -> SkippedSamples:
        """Return the skipped positions below ``position``."""
        return SkippedSamples.of((a, min(b, position)) for a, b in self.ranges)


NO_SKIPPED_SAMPLES = SkippedSamples()


def apportion(total: int, weights: list[float]) -> list[int]:
    """Divide ``total`` in proportion to ``weights`` into integers that sum to it exactly.

    Uses the largest remainder method (Hamilton) on the decimal values of the weights: 0.1 is
    exactly a tenth. Ties go to the earlier entry.
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
    """Return the number of samples that a fold draws from each dataset, in the blend's order.

    Args:
        fold: the fold.
        per_epoch: samples per epoch of each dataset, by its name in the blend.
        sequence_length: tokens per sample.
        budget: result of :func:`fold_budget`.

    Raises:
        UserError: the budget is less than one sample.
    """
    kind = fold.kind
    if budget is None and kind in (None, "epochs"):
        times = {name: source.epochs or fold.epochs or 1 for name, source in fold.blend.items()}
        return [max(1, round(times[name] * per_epoch[name])) for name in fold.blend]
    if kind is None:  # Megatron-LM's order: datasets are weighted by size
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
    """Return the samples of a fold that starts at position ``first``; None without a budget.

    Iterations have the batch sizes that follow position ``first``, so a fold of N iterations during
    a batch size ramp-up is N iterations long. Skipped samples are not taken into account, because
    they must not change positions.
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
    """Facts about a dataset on disk."""

    key: str
    """Content digest: the dataset's identity, independent of its path."""
    tokens: int
    parts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Tokens per part of Megatron-LM's ``--split``, by ``(split, part)``, if splits are used."""
    stamp: str = field(default="", compare=False)
    """Stamp of its files when the facts were computed (``data/folds/datasets.py``)."""
    legacy_key: str = ""
    """Key used by earlier versions, if different (``data/folds/datasets.py``)."""
    checksums: str = ""
    """Checksums of its files in its manifest; not part of its identity."""
    largest_id: int | None = None
    """Largest token id in the blocks that were read; None if none was read."""
    block_tokens: BlockTokens | None = field(default=None, compare=False, repr=False)
    """Tokens per block of sequences."""
    checked: bool = field(default=True, compare=False)
    """Whether every entry of its index was checked."""
    declared: bool = field(default=False, compare=False)
    """Whether its files are missing, and its size is declared in the fold file."""

    def samples_per_epoch(self, sequence_length: int, split: str | None = None) -> int:
        """Return the samples per epoch, of the training part if ``split`` is given.

        Each sample needs one token more than its length, which it shares with the next sample.
        """
        return max(0, (self.part_tokens(split, "train") - 1) // sequence_length)

    def part_tokens(self, split: str | None, part: SplitPart) -> int:
        """Return the tokens of one part of a split; of the whole dataset if ``split`` is None."""
        return self.tokens if split is None else self.parts[split, part]


@dataclass(frozen=True)
class DatasetSlice:
    """Samples ``[start, start + samples)`` of a dataset's stream, drawn by one fold.

    In Megatron-LM's order the number of samples is the dataset's share, from which Megatron-LM
    deviates by a few samples.
    """

    name: str
    path: str
    key: str
    start: int
    samples: int
    samples_per_epoch: int
    amount: str = ""
    """Amount requested in the fold file, such as ``weight 3``."""
    checksums: str = ""
    """Checksums of the dataset's files in its manifest."""

    @property
    def end(self) -> int:
        """End of the slice in the stream (exclusive)."""
        return self.start + self.samples

    @property
    def last_epoch(self) -> int:
        """Number of the last epoch in the slice, from 0."""
        return (self.end - 1) // self.samples_per_epoch


@dataclass(frozen=True)
class MegatronBlend:
    """Arguments of Megatron-LM's dataset builder: a blend in Megatron-LM's order."""

    paths: tuple[str, ...]
    keys: tuple[str, ...]
    """Content digests of the datasets."""
    weights: tuple[float, ...] | None
    """None: in proportion to the datasets' sizes, at most one epoch of each."""
    split: str | None
    """Megatron-LM's ``--split``; None if the part uses whole datasets."""
    part: SplitPart
    samples: int
    seed: int


@dataclass(frozen=True)
class HeldOutDataset:
    """A validation dataset, read in the order of one shuffled epoch."""

    path: str
    key: str
    seed: int
    shuffle: Shuffle = "documents"


@dataclass(frozen=True)
class FoldPlan:
    """A fold at its position in the run."""

    name: str
    first_sample: int
    """Position of the first sample."""
    samples: int
    """Number of positions in the fold, including skipped ones."""
    slices: tuple[DatasetSlice, ...]
    digest: str
    """Digest of everything that determines this fold's samples and their order."""
    learning_rate: FoldLearningRate | None = None
    megatron: MegatronBlend | None = None
    """Arguments of Megatron-LM's builder, for a fold in Megatron-LM's order."""

    def __hash__(self) -> int:
        return hash(self.digest)  # called for every sample: avoid hashing all slices

    @property
    def end(self) -> int:
        """End position of the fold (exclusive)."""
        return self.first_sample + self.samples

    @property
    def order(self) -> str:
        """``folds`` or ``megatron``."""
        return "folds" if self.megatron is None else "megatron"


@dataclass(frozen=True)
class Schedule:
    """The training data of a whole run."""

    seed: int
    sequence_length: int
    folds: tuple[FoldPlan, ...]
    skips: SkippedSamples = NO_SKIPPED_SAMPLES
    shuffle: Shuffle = "documents"

    @property
    def total_positions(self) -> int:
        """Number of samples in all folds, including skipped ones."""
        return self.folds[-1].end

    @property
    def total_samples(self) -> int:
        """Number of samples that are not skipped."""
        return self.skips.kept_before(self.total_positions)

    def position(self, number: int) -> int:
        """Return the position of trained sample ``number``."""
        return self.skips.position(number)

    def consumed_end(self, consumed_samples: int) -> int:
        """Return the end position of the consumed samples (exclusive)."""
        return self.position(consumed_samples - 1) + 1 if consumed_samples > 0 else 0

    def fold_of_sample(self, number: int) -> FoldPlan:
        """Return the fold of trained sample ``number``; the last fold for the end of the run."""
        return self.fold_at_position(self.position(number))

    def fold_at_position(self, position: int) -> FoldPlan:
        """Return the fold at a position; the last fold for the end of the schedule."""
        place = bisect.bisect_right(self.folds, position, key=lambda fold: fold.end)
        return self.folds[min(place, len(self.folds) - 1)]

    def sample_range(self, fold: FoldPlan) -> tuple[int, int]:
        """Return the range ``[first, end)`` of the trained samples of a fold."""
        return self.skips.kept_before(fold.first_sample), self.skips.kept_before(fold.end)

    def consumed_folds(self, consumed_samples: int) -> dict[str, FoldFingerprint]:
        """Return the fingerprints of the folds that are wholly or partly consumed, by name."""
        end = self.consumed_end(consumed_samples)
        return {fold.name: self.fingerprint(fold) for fold in self.folds if fold.first_sample < end}

    def consumed_by_dataset(self, consumed_samples: int) -> dict[tuple[str, str], int]:
        """Return the consumed samples by ``(fold, dataset)``.

        Exact with ``shuffle: blocks``, and for a completed fold. Otherwise, in a partly consumed
        fold or one with skipped samples, each dataset is counted by its share: datasets are
        interleaved so that every part of a fold follows the blend to within as many samples as
        there are datasets.
        """
        end = self.consumed_end(consumed_samples)
        counts: dict[tuple[str, str], int] = {}
        for fold in self.folds:
            if fold.first_sample >= end:
                break
            shares = self._trained_by_slice(fold, min(end, fold.end))
            for dataset_slice, share in zip(fold.slices, shares, strict=True):
                counts[fold.name, dataset_slice.name] = share
        return counts

    def _trained_by_slice(self, fold: FoldPlan, end: int) -> list[int]:
        """Count the samples of a fold up to position ``end`` that are not skipped, by slice."""
        sizes = [dataset_slice.samples for dataset_slice in fold.slices]
        if self.shuffle == "documents" or fold.megatron is not None:
            return apportion(self.skips.kept(fold.first_sample, end), [float(n) for n in sizes])
        order, first = EvenInterleave(sizes), fold.first_sample
        counts = order.counts(end - first)
        for a, b in self.skips.ranges:
            if max(a, first) < min(b, end):
                counts -= order.counts(min(b, end) - first) - order.counts(max(a, first) - first)
        return [int(count) for count in counts]

    def fingerprint(self, fold: FoldPlan) -> FoldFingerprint:
        """Return the fingerprint of a fold, which checkpoints store."""
        return FoldFingerprint(
            digest=fold.digest,
            seed=self.seed,
            sequence_length=self.sequence_length,
            first_sample=fold.first_sample,
            samples=fold.samples,
            order=fold.order,
            shuffle=self.shuffle,
            split=fold.megatron.split if fold.megatron else None,
            datasets={
                dataset_slice.name: DatasetFingerprint(
                    path=dataset_slice.path,
                    key=dataset_slice.key,
                    asked=dataset_slice.amount,
                    start=dataset_slice.start,
                    samples=dataset_slice.samples,
                    checksums=dataset_slice.checksums,
                )
                for dataset_slice in fold.slices
            },
        )

    def with_skips(self, skips: SkippedSamples) -> Schedule:
        """Return the same schedule with other skipped samples."""
        return replace(self, skips=skips)


def epoch_seed(seed: int, key: str, epoch: int) -> int:
    """Return the seed of one epoch of one dataset, below 2^32."""
    digest = hashlib.sha256(f"{seed}/{key}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
