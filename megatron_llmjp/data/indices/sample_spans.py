"""Sequences that a sample consists of, and samples that contain a document, of any epoch order."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.indices.block_shuffle import BlockShuffledEpoch, SequenceSpan


def sequence_spans(data: Any, sample: int) -> list[SequenceSpan]:
    """Return the parts of sequences that form a sample of a GPTDataset, in order."""
    if isinstance(data, BlockShuffledEpoch):
        return data.sequence_spans(sample)
    row = int(data.shuffle_index[sample])
    (first, begin), (last, end) = (
        (int(place), int(offset)) for place, offset in data.sample_index[row : row + 2]
    )
    spans = []
    for place in range(first, last + 1):
        sequence = int(data.document_index[place])
        start = begin if place == first else 0
        stop = end + 1 if place == last else int(data.dataset.sequence_lengths[sequence])
        if stop > start:
            spans.append(SequenceSpan(sequence, start, stop - start))
    return spans


def samples_containing(data: Any, document: int) -> npt.NDArray[np.int64]:
    """Return the numbers of the samples of a GPTDataset that contain a document, ascending."""
    first, end = (int(n) for n in data.dataset.document_indices[document : document + 2])
    if isinstance(data, BlockShuffledEpoch):
        return data.samples_containing(range(first, end))
    index, samples = np.asarray(data.document_index), np.asarray(data.sample_index)
    places = np.flatnonzero((index >= first) & (index < end))
    lengths = np.asarray(data.dataset.sequence_lengths)
    places = places[lengths[index[places]] > 0]
    # Sample i spans rows i and i + 1 of the sample index, both ends inclusive.
    starts, stops = samples[:-1, 0], samples[1:, 0]
    low = np.searchsorted(stops, places, side="left")
    high = np.searchsorted(starts, places, side="right")
    ranges = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    if not ranges:
        return np.empty(0, np.int64)
    rows = np.unique(np.concatenate(ranges))
    return np.flatnonzero(np.isin(np.asarray(data.shuffle_index), rows))
