"""Writing of documents in their final order, without duplicates, in bounded memory.

Shuffled documents are stored as sorted runs: the range of the keys is divided into slices of about
``SLICE_BYTES`` of tokens; the documents of a slice are consecutive in each run. They are read,
sorted by their keys and written. Every key occurs once, so that the result depends neither on the
number of runs nor on their boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.document_sources.columns import DocumentSources, join_sources
from data_tools.preprocess.arrangement.staged_dataset import (
    Run,
    StagedDataset,
    find_runs,
)
from data_tools.preprocess.encoding.packed_documents import PackedDocuments, join_documents
from data_tools.preprocess.selection.document_records import Arrangement, Records
from megatron_llmjp.data.indexed_dataset import bin_path

SLICE_BYTES = 64 << 20
"""Bytes of tokens and records of a slice of shuffled documents."""
DOCUMENTS_PER_SLICE = 1 << 16
"""Documents of a slice in the order of the input."""

Part = tuple[PackedDocuments, Records, DocumentSources | None]
"""Documents, their records, and their sources if they are recorded."""


@dataclass(frozen=True)
class ArrangedDocuments:
    """The documents of datasets in their final order, in slices.

    Attributes:
        datasets: the datasets; without a seed, they are concatenated.
        arrangement: the order.
        removed: for each dataset, an array that is not 0 for documents to remove; or None.
        runs: sorted runs, if the documents are shuffled.
        slices: number of slices.
    """

    datasets: Sequence[StagedDataset]
    arrangement: Arrangement
    removed: Sequence[npt.NDArray[Any]] | None
    runs: Sequence[Run]
    slices: int

    @classmethod
    def of(
        cls,
        datasets: Sequence[StagedDataset],
        arrangement: Arrangement,
        removed: Sequence[npt.NDArray[Any]] | None,
    ) -> ArrangedDocuments:
        """Find the runs and slices of datasets."""
        if arrangement.shuffle_seed is None:
            counts = (dataset.index.documents for dataset in datasets)
            slices = sum(-(-count // DOCUMENTS_PER_SLICE) for count in counts)
            return cls(datasets, arrangement, removed, [], slices)
        size = sum(
            bin_path(dataset.index.prefix).stat().st_size
            + dataset.index.documents * dataset.record_dtype.itemsize
            for dataset in datasets
        )
        slices = max(1, -(-size // SLICE_BYTES))
        runs = find_runs(datasets, arrangement, slices)
        return cls(datasets, arrangement, removed, runs, slices)

    def slice_parts(self, first: int = 0) -> Iterator[Iterator[Part]]:
        """Yield the documents of each slice from number ``first`` on, with their records."""
        if self.arrangement.shuffle_seed is not None:
            for number in range(first, self.slices):
                yield self._sorted_slice(number)
            return
        starts = [
            (number, start)
            for number, dataset in enumerate(self.datasets)
            for start in range(0, dataset.index.documents, DOCUMENTS_PER_SLICE)
        ]
        for number, start in starts[first:]:
            yield self._unsorted_slice(number, start)

    def _sorted_slice(self, number: int) -> Iterator[Part]:
        parts = [self._read(run.dataset, *run.bounds[number : number + 2]) for run in self.runs]
        documents = join_documents([part[0] for part in parts], self.datasets[0].index.dtype)
        records = np.concatenate([part[1] for part in parts]) if parts else np.empty(0)
        found = [part[2] for part in parts if part[2] is not None]
        sources = join_sources(found) if found else None
        del parts
        if len(records):
            order = np.argsort(self.arrangement.sort_keys(records))
            yield documents.take(order), records[order], sources and sources.take(order)

    def _unsorted_slice(self, number: int, start: int) -> Iterator[Part]:
        """Yield the documents of a slice in parts of limited size."""
        index = self.datasets[number].index
        end = min(start + DOCUMENTS_PER_SLICE, index.documents)
        firsts = index.document_indices[start : end + 1]
        offsets = np.full(len(firsts), bin_path(index.prefix).stat().st_size, np.int64)
        known = firsts < index.sequences
        offsets[known] = index.pointers[firsts[known]]
        while start < end:
            limit = offsets[0] + SLICE_BYTES
            count = max(1, int(np.searchsorted(offsets, limit, side="right")) - 1)
            yield self._read(number, start, start + count)
            start, offsets = start + count, offsets[count:]

    def _read(self, number: int, first: int, end: int) -> Part:
        """Return documents and their records, without those that are removed."""
        dataset = self.datasets[number]
        documents, records = dataset.documents(first, end), dataset.records(first, end)
        sources = None if dataset.read_sources is None else dataset.read_sources(first, end)
        if self.removed is None:
            return documents, records, sources
        chosen = np.flatnonzero(self.removed[number][first:end] == 0)
        if len(chosen) == len(records):
            return documents, records, sources
        return documents.take(chosen), records[chosen], sources and sources.take(chosen)
