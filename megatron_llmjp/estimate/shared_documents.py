"""Documents that several datasets of a run share: warnings, and the repetition of their tokens.

Datasets share documents if they share one ``.bin`` file, as the folds of split_folds do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.data.indexed_dataset import DatasetIndex, bin_path, idx_path, read_index
from megatron_llmjp.estimate.repetition import MAX_EPOCHS, DatasetUse

SHOWN = 10
"""Warnings on pairs of datasets that are printed."""
START_INDEX_BYTES = 500_000_000
"""Bytes of ``.idx`` files that can be compared within about a second."""


def shared_document_warnings(file: FoldFile, largest: int | None = None) -> list[str]:
    """Return a warning for each pair of datasets of a fold file that share documents.

    Datasets are compared if they share a ``.bin`` through a hard or symbolic link; documents are
    the same if they start at the same token. Only the indices of such datasets are read.

    Args:
        file: the fold file.
        largest: maximum size of the ``.idx`` files of datasets that share a ``.bin``, in bytes;
            above it, they are not compared and the warning names plan_folds.
    """
    found, not_compared = [], []
    for paths in _sharing(file.dataset_paths()):
        size = sum(idx_path(path).stat().st_size for path in paths)
        if largest is not None and size > largest:
            not_compared.append(
                f"{paths[0]} and {len(paths) - 1:,} more share a .bin, but their indices are too "
                "large to search for shared documents at the start: run plan_folds"
            )
            continue
        found += [
            f"{one} and {other} share a .bin and {count:,} documents, of {of:,} in the smaller "
            "dataset"
            for one, other, count, of in _pairs(paths)
        ]
    more = [f"... and {len(found) - SHOWN:,} more such pairs"] if len(found) > SHOWN else []
    return found[:SHOWN] + more + not_compared


def _sharing(paths: Iterable[str]) -> list[list[str]]:
    """Return groups of two or more datasets that share a ``.bin``."""
    groups: dict[tuple[int, int], list[str]] = {}
    for path in paths:
        if not bin_path(path).is_file():
            continue  # planned on a machine without the data
        status = bin_path(path).stat()
        groups.setdefault((status.st_dev, status.st_ino), []).append(path)
    return [members for members in groups.values() if len(members) > 1]


def _pairs(members: list[str]) -> Iterator[tuple[str, str, int, int]]:
    """Yield each pair of datasets with shared documents: how many, and how many in the smaller."""
    starts = {path: _starts(read_index(path)) for path in members}
    if len(np.unique(np.concatenate(list(starts.values())))) == sum(map(len, starts.values())):
        return
    for one, other in itertools.combinations(members, 2):
        count = len(np.intersect1d(starts[one], starts[other], assume_unique=True))
        if count:
            yield one, other, count, min(len(starts[one]), len(starts[other]))


def _starts(index: DatasetIndex) -> npt.NDArray[Any]:
    """Return the offsets of all non-empty documents in the .bin."""
    filled = np.concatenate(([0], np.cumsum(index.lengths > 0)))
    bounds = index.document_indices
    first = bounds[:-1][filled[bounds[1:]] > filled[bounds[:-1]]]
    return np.unique(index.pointers[first])


def shared_repetition_warnings(uses: Sequence[DatasetUse], largest: int | None = None) -> list[str]:
    """Return a warning for each dataset whose tokens are also used in other datasets.

    Args:
        uses: use of each dataset in the run.
        largest: as for :func:`shared_document_warnings`; larger indices are not compared.
    """
    by_path = {use.path: use for use in uses}
    found = []
    for paths in _sharing(by_path):
        if largest is not None and sum(idx_path(path).stat().st_size for path in paths) > largest:
            continue
        for path, times in _total_epochs([by_path[path] for path in paths]):
            own = by_path[path].epochs
            if times > own + 0.005:
                many = f", more than {MAX_EPOCHS}" if times > MAX_EPOCHS >= own else ""
                found.append(
                    f"tokens of {path} are used {times:.2f} times{many}: {own:.2f} epochs of this "
                    "dataset, and in datasets that share its .bin"
                )
    more = [f"... and {len(found) - SHOWN:,} more such datasets"] if len(found) > SHOWN else []
    return found[:SHOWN] + more


def _total_epochs(uses: Sequence[DatasetUse]) -> Iterator[tuple[str, float]]:
    """Yield how often the tokens of each dataset are used on average, in all datasets given."""
    starts, lengths = zip(*(_documents(read_index(use.path)) for use in uses), strict=True)
    epochs = np.concatenate([np.full(len(s), u.epochs) for s, u in zip(starts, uses, strict=True)])
    unique, numbers = np.unique(np.concatenate(starts), return_inverse=True)
    totals = np.bincount(numbers, weights=epochs, minlength=len(unique))[numbers]
    ends = np.cumsum([len(s) for s in starts])
    for use, end, sizes in zip(uses, ends, lengths, strict=True):
        if sizes.sum():
            yield use.path, float(np.average(totals[end - len(sizes) : end], weights=sizes))


def _documents(index: DatasetIndex) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return the offsets in the .bin of all non-empty documents, and their tokens."""
    totals = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))
    tokens = np.diff(totals[index.document_indices])
    filled = np.flatnonzero(tokens)
    # The first sequences of a document may be empty: their offset is that of the next one.
    first = index.document_indices[:-1][filled]
    return np.asarray(index.pointers[first]), tokens[filled]
