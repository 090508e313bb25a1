"""Documents that several datasets hold because they share one .bin, as folds of split_folds do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.fold_file import FoldFile
from megatron_llmjp.data.indexed import Index, bin_path, idx_path, read_index

SHOWN = 10
QUICK_BYTES = 500_000_000
"""Indices of this size are compared within about a second."""


def overlaps(file: FoldFile, largest: int | None = None) -> list[str]:
    """Return a warning for each pair of datasets of a fold file that hold the same documents.

    Datasets are compared if they share a ``.bin``, by a hard or symbolic link; documents are the
    same if they begin at the same token. Reads the indices of such datasets.

    Args:
        file: the fold file.
        largest: bytes of ``.idx`` files up to which datasets that share a ``.bin`` are compared;
            for more than that, the warning says how to compare them.
    """
    found, left_out = [], []
    for paths in _sharing(file.sources()):
        size = sum(idx_path(path).stat().st_size for path in paths)
        if largest is not None and size > largest:
            left_out.append(
                f"{paths[0]} and {len(paths) - 1:,} more share a .bin, but their indices are too "
                "large to look for common documents here: run plan_folds"
            )
            continue
        found += [
            f"{one} and {other} hold {count:,} documents in common, of {of:,} in the smaller: "
            "they share a .bin"
            for one, other, count, of in _pairs(paths)
        ]
    more = [f"... and {len(found) - SHOWN:,} more such pairs"] if len(found) > SHOWN else []
    return found[:SHOWN] + more + left_out


def _sharing(paths: Iterable[str]) -> list[list[str]]:
    """Return groups of two or more datasets that share a ``.bin``."""
    groups: dict[tuple[int, int], list[str]] = {}
    for path in paths:
        if not bin_path(path).is_file():
            continue  # planned where the data is not
        status = bin_path(path).stat()
        groups.setdefault((status.st_dev, status.st_ino), []).append(path)
    return [members for members in groups.values() if len(members) > 1]


def _pairs(members: list[str]) -> Iterator[tuple[str, str, int, int]]:
    """Yield each pair of datasets with common documents: how many, and those of the smaller."""
    starts = {path: _starts(read_index(path)) for path in members}
    if len(np.unique(np.concatenate(list(starts.values())))) == sum(map(len, starts.values())):
        return
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
