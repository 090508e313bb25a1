"""Checks of every entry of an index against the .bin, in constant memory.

An index that is damaged between its first and its last entry gives tokens of other documents, or
an error in the middle of a run. Reading 20 bytes per sequence, these checks are made when a
dataset is first used by a run (``facts.py`` remembers it) and by every data tool. Without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.indexed import Index, bin_path, idx_path, read_index
from megatron_llmjp.errors import DataError

CHUNK = 1 << 20  # entries at a time

Mask = npt.NDArray[np.bool_]


def read_checked(prefix: str | Path) -> Index:
    """Open an .idx as :func:`read_index` does, and check every entry.

    Raises:
        UserError: as read_index.
        DataError: an entry is damaged; it is named.
    """
    index = read_index(prefix)
    check_entries(index)
    return index


def check_entries(index: Index) -> None:
    """Check lengths, pointers and documents of an index against each other and the .bin.

    Sequences must be in the .bin, at whole tokens, and share no token; they need not be in order
    nor cover the .bin, as those of a fold do not.

    Raises:
        DataError: an entry is damaged; the first such is named.
    """
    size, total = index.dtype.itemsize, bin_path(index.prefix).stat().st_size
    in_order, end = True, 0
    for first, lengths, pointers in _chunks(index):
        _check(index, first, lengths < 0, "length {length} is negative", lengths, pointers)
        outside = (pointers < 0) | (pointers > total - lengths.astype(np.int64) * size)
        problem = (
            f"{{length}} tokens at byte {{pointer}} are outside the {total:,} bytes of the .bin"
        )
        _check(index, first, outside, problem, lengths, pointers)
        inside = pointers % size != 0
        _check(index, first, inside, "byte {pointer} is inside a token", lengths, pointers)
        ends = pointers + lengths.astype(np.int64) * size
        starts = np.concatenate(([end], ends[:-1]))
        in_order = in_order and bool((pointers >= starts).all())
        end = int(ends[-1])
    if not in_order:
        _check_overlap(index)
    _check_documents(index)


def _chunks(
    index: Index,
) -> Iterator[tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
    for first in range(0, index.sequences, CHUNK):
        part = slice(first, first + CHUNK)
        yield first, np.asarray(index.lengths[part]), np.asarray(index.pointers[part])


def _check(
    index: Index, first: int, wrong: Mask, problem: str, lengths: Any, pointers: Any
) -> None:
    """Raise for the first sequence of a chunk for which ``wrong`` is set."""
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        found = problem.format(length=f"{lengths[at]:,}", pointer=f"{pointers[at]:,}")
        _refuse(index, f"sequence {first + at:,}: {found}")


def _check_overlap(index: Index) -> None:
    """Raise if two sequences share a token; only for an index that is not in order."""
    filled = np.flatnonzero(index.lengths)
    order = filled[np.argsort(index.pointers[filled], kind="stable")]
    starts = index.pointers[order]
    ends = starts + index.lengths[order].astype(np.int64) * index.dtype.itemsize
    shared = starts[1:] < ends[:-1]
    if shared.any():
        at = int(np.flatnonzero(shared)[0])
        one, other = sorted((int(order[at]), int(order[at + 1])))
        _refuse(index, f"sequences {one:,} and {other:,} hold the same tokens of the .bin")


def _check_documents(index: Index) -> None:
    for first in range(0, index.documents, CHUNK):
        ends = np.asarray(index.document_indices[first : first + CHUNK + 1])
        if (ends[1:] < ends[:-1]).any():
            at = int(np.flatnonzero(ends[1:] < ends[:-1])[0])
            _refuse(
                index, f"document {first + at:,} begins at sequence {ends[at]:,} and ends before it"
            )


def _refuse(index: Index, problem: str) -> NoReturn:
    raise DataError(
        f"{idx_path(index.prefix)}: {problem}. The index is damaged or belongs to another .bin: "
        "copy both files again, or make the dataset again with preprocess_data."
    )
