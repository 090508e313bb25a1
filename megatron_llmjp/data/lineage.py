"""From a sample to the documents it is made of, and back.

What a sample holds is written in megatron-core's indices (``GPTDataset``): the shuffle index says
which sample of the unshuffled stream it is, the sample index where that begins and ends in the
stream of documents, the document index which documents these are. Everything here reads these
indices; no process group is needed, and no token is read until ``read_tokens`` is asked.

A sample is ``sequence_length + 1`` tokens: the last one is a label only, and the first of the next
sample of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.folds.schedule import DatasetSlice, FoldPlan, Schedule, epoch_seed
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.data.indices.interleave import FoldOrder
from megatron_llmjp.data.indices.megatron_order import megatron_index

OPEN = 64
"""Epochs of datasets kept open."""


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of one document."""

    dataset: str
    """The name that the fold gives the dataset."""
    path: str
    document: int
    first_token: int
    tokens: int


@dataclass(frozen=True)
class SampleOrigin:
    """Where a sample comes from."""

    number: int | None
    """Of the trained samples, from 0; None for one that is skipped."""
    position: int
    """In the schedule, skipped samples counted."""
    fold: str
    epoch: int | None
    """How often the dataset had been used up before, from 0; None in Megatron-LM's order, which
    may mix the epochs of a dataset."""
    spans: tuple[TokenSpan, ...]


class Lineage:
    """The origins of a run's samples.

    Args:
        schedule: the resolved folds.
        epochs: opens the indices of their datasets, which are made where they are missing.
    """

    def __init__(self, schedule: Schedule, epochs: EpochDatasets) -> None:
        self.schedule = schedule
        self._epochs = epochs
        self._epoch = lru_cache(maxsize=OPEN)(self._open_epoch)
        self._order = lru_cache(maxsize=2)(lambda fold: FoldOrder(epochs.cache, fold).open())
        self._megatron = lru_cache(maxsize=2)(
            lambda blend: megatron_index(blend, epochs).open(epochs)
        )

    def documents_of(self, number: int) -> list[tuple[str, int, int, int]]:
        """(dataset, document, first token, tokens) of everything in trained sample ``number``."""
        spans = self.origin(self.schedule.position(number)).spans
        return [(s.dataset, s.document, s.first_token, s.tokens) for s in spans]

    def origin(self, position: int) -> SampleOrigin:
        """The origin of the sample at a position of the schedule.

        Raises:
            IndexError: the schedule has no such position.
        """
        if not 0 <= position < self.schedule.total_positions:
            raise IndexError(f"position {position} of {self.schedule.total_positions}")
        fold = self.schedule.fold_at_position(position)
        inside = position - fold.first_sample
        epoch = None
        if fold.megatron is not None:
            place, data, sample = self._megatron(fold.megatron).source(inside)
            piece = fold.slices[place]
        else:
            which, number = self._order(fold)
            piece = fold.slices[which[inside]]
            epoch, sample = divmod(piece.start + int(number[inside]), piece.samples_per_epoch)
            data = self._epoch(piece, epoch)
        return SampleOrigin(
            number=self._number(position),
            position=position,
            fold=fold.name,
            epoch=epoch,
            spans=sample_spans(piece, data, sample),
        )

    def positions_of(self, key: str, document: int) -> Iterator[int]:
        """Positions of all samples that hold a token of a document, in order.

        Args:
            key: digest of the dataset's contents.
            document: its number in the dataset.
        """
        for fold in self.schedule.folds:
            found = [
                number
                for place, piece in enumerate(fold.slices)
                if piece.key == key
                for number in self._in_fold(fold, place, document)
            ]
            yield from (fold.first_sample + number for number in sorted(found))

    def _in_fold(self, fold: FoldPlan, place: int, document: int) -> list[int]:
        """Numbers in a fold of the samples of its dataset ``place`` that hold a document."""
        if fold.megatron is not None:
            samples = self._megatron(fold.megatron)
            wanted = samples_containing(samples.datasets[place], document)
            return [int(number) for number in samples.numbers(place, wanted)]
        wanted = self._in_slice(fold.slices[place], document)
        if not len(wanted):
            return []
        which, number = self._order(fold)
        return [int(n) for n in np.flatnonzero((which == place) & np.isin(number, wanted))]

    def _in_slice(self, piece: DatasetSlice, document: int) -> npt.NDArray[np.int64]:
        """Numbers in the slice of the samples that hold a document."""
        first, size = piece.start // piece.samples_per_epoch, piece.samples_per_epoch
        numbers = [
            epoch * size + samples_containing(self._epoch(piece, epoch), document) - piece.start
            for epoch in range(first, piece.last_epoch + 1 if piece.samples else first)
        ]
        found = np.concatenate([np.empty(0, np.int64), *numbers])
        return found[(found >= 0) & (found < piece.samples)]

    def _number(self, position: int) -> int | None:
        number = self.schedule.skips.kept_before(position)
        skipped = self.schedule.skips.kept(position, position + 1) == 0
        return None if skipped else number

    def _open_epoch(self, piece: DatasetSlice, epoch: int) -> Any:
        seed = epoch_seed(self.schedule.seed, piece.key, epoch)
        return self._epochs.open(piece.key, piece.path, seed)


def sample_spans(piece: DatasetSlice, data: Any, sample: int) -> tuple[TokenSpan, ...]:
    """The documents of one sample of a GPTDataset, in order."""
    row = int(data.shuffle_index[sample])
    (first, begin), (last, end) = (
        (int(place), int(offset)) for place, offset in data.sample_index[row : row + 2]
    )
    lengths, documents = data.dataset.sequence_lengths, data.dataset.document_indices
    spans = []
    for place in range(first, last + 1):
        sequence = int(data.document_index[place])
        start = begin if place == first else 0
        stop = end + 1 if place == last else int(lengths[sequence])
        if stop > start:
            document = int(np.searchsorted(documents, sequence, side="right")) - 1
            before = int(lengths[int(documents[document]) : sequence].sum(dtype=np.int64))
            spans.append(TokenSpan(piece.name, piece.path, document, before + start, stop - start))
    return tuple(spans)


def samples_containing(data: Any, document: int) -> npt.NDArray[np.int64]:
    """Numbers of the samples of a GPTDataset that hold a token of a document, ascending."""
    first, end = (int(n) for n in data.dataset.document_indices[document : document + 2])
    index = data.document_index
    places = np.flatnonzero((index >= first) & (index < end))
    lengths = data.dataset.sequence_lengths
    places = places[lengths[index[places]] > 0]
    # Samples are rows [i, i + 1] of the sample index; both ends belong to them.
    starts, stops = data.sample_index[:-1, 0], data.sample_index[1:, 0]
    low = np.searchsorted(stops, places, side="left")
    high = np.searchsorted(starts, places, side="right")
    ranges = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    if not ranges:
        return np.empty(0, np.int64)
    rows = np.unique(np.concatenate(ranges))
    return np.flatnonzero(np.isin(data.shuffle_index, rows))


def read_tokens(span: TokenSpan) -> npt.NDArray[Any]:
    """The token ids of a span, read from its document."""
    index = read_index(span.path)
    first, end = index.document_indices[span.document : span.document + 2]
    tokens, size = index.read_tokens(), index.dtype.itemsize
    parts = [
        tokens[(at := int(index.pointers[s]) // size) : at + int(index.lengths[s])]
        for s in range(int(first), int(end))
    ]
    return np.concatenate(parts)[span.first_token : span.first_token + span.tokens]
