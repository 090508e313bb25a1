"""Documents with the same texts: which ones are removed, in bounded memory.

The digests of all documents are divided by their first bits into files of about ``BUCKET_BYTES``,
and each file is sorted in memory. Of the documents with the same digest, the one with the smallest
position in the input is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.preprocess.arrangement.staged_dataset import StagedDataset

BUCKET_BYTES = 32 << 20
MAX_BUCKETS = 1 << 12
ENTRY = np.dtype([("digest", "<u8", (2,)), ("position", "<u8"), ("document", "<u8")])
"""Temporary entry of a document on disk."""


def find_duplicates(datasets: Sequence[StagedDataset], folder: Path) -> list[npt.NDArray[Any]]:
    """Return for each dataset an array that is 1 for documents to remove, 0 for others.

    The arrays are memory-mapped from a file of one byte per document.

    Args:
        datasets: datasets with digests in their records.
        folder: folder for temporary files; existing ones are removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    counts = [dataset.index.documents for dataset in datasets]
    total = sum(counts)
    if not total:
        return [np.zeros(0, np.uint8) for _ in datasets]
    removed: npt.NDArray[np.uint8] = np.memmap(folder / "removed", np.uint8, "w+", shape=(total,))
    bits = min(max(0, -(-total * ENTRY.itemsize // BUCKET_BYTES) - 1), MAX_BUCKETS - 1).bit_length()
    before = 0
    for dataset, count in zip(datasets, counts, strict=True):
        _divide(dataset, before, bits, folder)
        before += count
    for path in folder.glob("bucket*"):
        _mark(np.fromfile(path, ENTRY), removed)
        path.unlink()
    return [
        removed[end - count : end] for end, count in zip(np.cumsum(counts), counts, strict=True)
    ]


def _divide(dataset: StagedDataset, before: int, bits: int, folder: Path) -> None:
    """Append the entries of a dataset to the files of their digests' first bits."""
    for first, records in dataset.record_chunks():
        entries = np.empty(len(records), ENTRY)
        entries["digest"], entries["position"] = records["digest"], records["position"]
        entries["document"] = np.arange(before + first, before + first + len(records))
        buckets = (
            entries["digest"][:, 0] >> np.uint64(64 - bits) if bits else np.zeros(len(records))
        )
        order = np.argsort(buckets, kind="stable")
        names, starts = np.unique(buckets[order], return_index=True)
        for name, part in zip(names, np.split(entries[order], starts[1:]), strict=True):
            with (folder / f"bucket{int(name)}").open("ab") as file:
                file.write(part.tobytes())


def _mark(entries: npt.NDArray[Any], removed: npt.NDArray[np.uint8]) -> None:
    """Set the entries of all documents but the first with each digest."""
    high, low = entries["digest"][:, 0], entries["digest"][:, 1]
    order = np.lexsort((entries["position"], low, high))
    high, low = high[order], low[order]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    removed[entries["document"][order][1:][same].astype(np.int64)] = 1
