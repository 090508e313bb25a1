"""Documents that several datasets hold because they share one .bin, as folds of split_folds do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.fold_file import FoldFile
from megatron_llmjp.data.indexed import Index, bin_path, read_index

SHOWN = 10


def overlaps(file: FoldFile) -> list[str]:
    """Return a warning for each pair of datasets of a fold file that hold the same documents.

    Datasets are compared if they share a ``.bin``, by a hard or symbolic link; documents are the
    same if they begin at the same token. Reads the indices of such datasets.
    """
    found = [
        f"{one} and {other} hold {count:,} documents in common, of {of:,} in the smaller: "
        "they share a .bin"
        for one, other, count, of in _pairs(file.sources())
    ]
    more = [f"... and {len(found) - SHOWN:,} more such pairs"] if len(found) > SHOWN else []
    return found[:SHOWN] + more


def _pairs(paths: Iterable[str]) -> Iterator[tuple[str, str, int, int]]:
    groups: dict[tuple[int, int], list[str]] = {}
    for path in paths:
        if not bin_path(path).is_file():
            continue  # planned where the data is not
        status = bin_path(path).stat()
        groups.setdefault((status.st_dev, status.st_ino), []).append(path)
    for members in groups.values():
        if len(members) < 2:
            continue
        starts = {path: _starts(read_index(path)) for path in members}
        if len(np.unique(np.concatenate(list(starts.values())))) == sum(map(len, starts.values())):
            continue
        for one, other in itertools.combinations(members, 2):
            count = len(np.intersect1d(starts[one], starts[other], assume_unique=True))
            if count:
                yield one, other, count, min(len(starts[one]), len(starts[other]))


def _starts(index: Index) -> npt.NDArray[Any]:
    """Return where each document begins in the .bin, without those that hold no token."""
    filled = np.concatenate(([0], np.cumsum(index.lengths > 0)))
    bounds = index.document_indices
    first = bounds[:-1][filled[bounds[1:]] > filled[bounds[:-1]]]
    return np.unique(index.pointers[first])
