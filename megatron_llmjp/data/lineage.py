"""Data lineage: the documents that each sample contains, and the samples that contain a document.

Both are derived from the order of an epoch (``indices/sample_spans.py``): megatron-core's stored
shuffle, sample and document indices, or the computed block-wise shuffle. This needs no process
group, and reads no tokens until :func:`read_tokens` is called.

A sample consists of ``sequence_length + 1`` tokens: the last one is used only as a label and is the
first token of the next sample of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.folds.schedule import DatasetSlice, FoldPlan, Schedule, epoch_seed
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.indices.interleave import fold_order
from megatron_llmjp.data.indices.megatron_order import megatron_index
from megatron_llmjp.data.indices.sample_spans import samples_containing, sequence_spans

MAX_OPEN_EPOCHS = 64
"""Number of dataset epochs kept open."""


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of one document."""

    dataset: str
    """Name of the dataset in the fold."""
    path: str
    document: int
    first_token: int
    tokens: int


@dataclass(frozen=True)
class SampleOrigin:
    """Origin of a sample: its fold, epoch and documents."""

    number: int | None
    """Number among the trained samples, from 0; None for a skipped sample."""
    position: int
    """Position in the schedule, which counts skipped samples too."""
    fold: str
    epoch: int | None
    """Epoch of the dataset, from 0; None in Megatron-LM's order, which may mix epochs."""
    spans: tuple[TokenSpan, ...]


class Lineage:
    """Lookup of sample origins in a run.

    Args:
        schedule: the resolved folds.
        epochs: opens the indices of their datasets, and builds missing ones.
    """

    def __init__(self, schedule: Schedule, epochs: EpochDatasets) -> None:
        self.schedule = schedule
        self.epochs = epochs
        self._epoch = lru_cache(maxsize=MAX_OPEN_EPOCHS)(self._open_epoch)
        self._order = lru_cache(maxsize=2)(partial(fold_order, schedule.shuffle, epochs.cache))
        self._megatron = lru_cache(maxsize=2)(
            lambda blend: megatron_index(blend, epochs).open(epochs)
        )

    def documents_of(self, number: int) -> list[tuple[str, int, int, int]]:
        """Return (dataset, document, first token, tokens) of each part of a trained sample."""
        spans = self.origin(self.schedule.position(number)).spans
        return [(s.dataset, s.document, s.first_token, s.tokens) for s in spans]

    def origin(self, position: int) -> SampleOrigin:
        """Return the origin of the sample at a position of the schedule.

        Raises:
            IndexError: the position is outside the schedule.
        """
        if not 0 <= position < self.schedule.total_positions:
            raise IndexError(f"position {position} of {self.schedule.total_positions}")
        fold = self.schedule.fold_at_position(position)
        inside = position - fold.first_sample
        epoch = None
        if fold.megatron is not None:
            place, data, sample = self._megatron(fold.megatron).source(inside)
            dataset_slice = fold.slices[place]
        else:
            place, number = self._order(fold).locate(inside)
            dataset_slice = fold.slices[place]
            epoch, sample = divmod(dataset_slice.start + number, dataset_slice.samples_per_epoch)
            data = self._epoch(dataset_slice, epoch)
        return SampleOrigin(
            number=self._number(position),
            position=position,
            fold=fold.name,
            epoch=epoch,
            spans=sample_spans(dataset_slice, data, sample),
        )

    def positions_of(self, key: str, document: int) -> Iterator[int]:
        """Yield the positions of all samples that contain a token of a document, in order.

        Args:
            key: content digest of the dataset.
            document: number of the document in the dataset.
        """
        for fold in self.schedule.folds:
            found = [
                number
                for place, dataset_slice in enumerate(fold.slices)
                if dataset_slice.key == key
                for number in self._in_fold(fold, place, document)
            ]
            yield from (fold.first_sample + number for number in sorted(found))

    def _in_fold(self, fold: FoldPlan, place: int, document: int) -> list[int]:
        """Return the offsets in a fold of the samples of dataset ``place`` with this document."""
        if fold.megatron is not None:
            samples = self._megatron(fold.megatron)
            wanted = samples_containing(samples.datasets[place], document)
            return [int(number) for number in samples.numbers(place, wanted)]
        wanted = self._in_slice(fold.slices[place], document)
        if not len(wanted):
            return []
        return [int(n) for n in self._order(fold).positions(place, wanted)]

    def _in_slice(self, dataset_slice: DatasetSlice, document: int) -> npt.NDArray[np.int64]:
        """Return the offsets in the slice of the samples with this document."""
        first, size = (
            dataset_slice.start // dataset_slice.samples_per_epoch,
            dataset_slice.samples_per_epoch,
        )
        numbers = [
            epoch * size
            + samples_containing(self._epoch(dataset_slice, epoch), document)
            - dataset_slice.start
            for epoch in range(
                first, dataset_slice.last_epoch + 1 if dataset_slice.samples else first
            )
        ]
        found = np.concatenate([np.empty(0, np.int64), *numbers])
        return found[(found >= 0) & (found < dataset_slice.samples)]

    def _number(self, position: int) -> int | None:
        number = self.schedule.skips.kept_before(position)
        skipped = self.schedule.skips.kept(position, position + 1) == 0
        return None if skipped else number

    def _open_epoch(self, dataset_slice: DatasetSlice, epoch: int) -> Any:
        seed = epoch_seed(self.schedule.seed, dataset_slice.key, epoch)
        return self.epochs.open(dataset_slice.key, dataset_slice.path, seed, self.schedule.shuffle)


def sample_spans(dataset_slice: DatasetSlice, data: Any, sample: int) -> tuple[TokenSpan, ...]:
    """Return the documents of one sample of a GPTDataset, in order."""
    spans = []
    for sequence, start, tokens in sequence_spans(data, sample):
        document = data.dataset.document_of(sequence)
        first = int(data.dataset.document_indices[document])
        before = int(data.dataset.sequence_lengths[first:sequence].sum(dtype=np.int64))
        name, path = dataset_slice.name, dataset_slice.path
        spans.append(TokenSpan(name, path, document, before + start, tokens))
    return tuple(spans)


def read_tokens(span: TokenSpan) -> npt.NDArray[Any]:
    """Return the token ids of a span, read from its document."""
    index = read_index(span.path)
    first, end = index.document_indices[span.document : span.document + 2]
    tokens, size = index.read_tokens(), index.dtype.itemsize
    parts = [
        tokens[(at := int(index.pointers[s]) // size) : at + int(index.lengths[s])]
        for s in range(int(first), int(end))
    ]
    return np.concatenate(parts)[span.first_token : span.first_token + span.tokens]
