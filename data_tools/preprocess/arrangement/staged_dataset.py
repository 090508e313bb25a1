"""Datasets whose documents have records: access to consecutive documents, runs in sorted order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.document_sources.columns import ReadSources
from data_tools.preprocess.encoding.packed_documents import PackedDocuments
from data_tools.preprocess.selection.document_records import Arrangement, Records
from megatron_llmjp.data.indexed_dataset import HEADER, DatasetIndex, bin_path, idx_path
from megatron_llmjp.errors import UserError

RECORDS_PER_CHUNK = 1 << 18


@dataclass(frozen=True)
class StagedDataset:
    """A dataset and the records of its documents, in the same order, and their sources."""

    index: DatasetIndex
    records_path: Path
    record_dtype: np.dtype[Any]
    read_sources: ReadSources | None = None

    def check(self) -> None:
        """Check that there is one record per document.

        Raises:
            UserError: the file of records is missing or has another size.
        """
        expected = self.index.documents * self.record_dtype.itemsize
        found = self.records_path.stat().st_size if self.records_path.is_file() else -1
        if found != expected:
            state = "missing" if found < 0 else f"{found:,} bytes"
            raise UserError(
                f"{self.records_path}: {state}, expected {expected:,} bytes for "
                f"{self.index.documents:,} documents. Write {self.index.prefix} again with "
                "preprocess_data --overwrite."
            )

    def records(self, first: int, end: int) -> Records:
        """Return the records of the documents ``[first, end)``."""
        offset = first * self.record_dtype.itemsize
        return np.fromfile(self.records_path, self.record_dtype, end - first, offset=offset)

    def record_chunks(self) -> Iterator[tuple[int, Records]]:
        """Yield the number of the first document and the records of each chunk."""
        for first in range(0, self.index.documents, RECORDS_PER_CHUNK):
            yield first, self.records(first, min(first + RECORDS_PER_CHUNK, self.index.documents))

    def documents(self, first: int, end: int) -> PackedDocuments:
        """Return the documents ``[first, end)``; their tokens are contiguous in the .bin."""
        path, at, total = idx_path(self.index.prefix), HEADER.size, self.index.sequences
        bounds = np.fromfile(path, "<i8", end - first + 1, offset=at + 12 * total + 8 * first)
        start, count = int(bounds[0]), int(bounds[-1] - bounds[0])
        lengths = np.fromfile(path, "<i4", count, offset=at + 4 * start)
        tokens = np.empty(0, self.index.dtype)
        if count:
            offset = int(np.fromfile(path, "<i8", 1, offset=at + 4 * total + 8 * start)[0])
            number = int(lengths.sum(dtype=np.int64))
            tokens = np.fromfile(
                bin_path(self.index.prefix), self.index.dtype, number, offset=offset
            )
        return PackedDocuments(tokens, lengths, np.diff(bounds).astype(np.int32))


@dataclass(frozen=True)
class Run:
    """Consecutive documents of a dataset in ascending order of their keys.

    Attributes:
        dataset: number of the dataset.
        bounds: first document of each slice of the keys, and the end of the last, ``[slices + 1]``.
    """

    dataset: int
    bounds: npt.NDArray[np.int64]


def find_runs(
    datasets: Sequence[StagedDataset], arrangement: Arrangement, slices: int
) -> list[Run]:
    """Return the sorted runs of datasets, divided into equal ranges of the keys.

    Args:
        datasets: the datasets.
        arrangement: defines the keys.
        slices: number of ranges.
    """
    limits = np.array([(at << 64) // slices for at in range(1, slices)], np.uint64)
    runs: list[Run] = []
    for number, dataset in enumerate(datasets):
        last = None
        for first, records in dataset.record_chunks():
            keys = arrangement.sort_keys(records)
            breaks = np.flatnonzero(keys[1:] < keys[:-1]) + 1
            starts = [0, *breaks.tolist()]
            for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
                if start or last is None or keys[0] < last:
                    runs.append(Run(number, np.full(slices + 1, first + start, np.int64)))
                bounds = runs[-1].bounds
                bounds[1:-1] += np.searchsorted(keys[start:end], limits)
                bounds[-1] += end - start
            last = keys[-1]
    return runs
