"""Contiguous runs: which ranges of a canonical tensor a stored part consists of.

A part of a layout is a strided view of the canonical tensor. If the view keeps the order of the
elements, any range of the canonical tensor is one range of the stored part, so that a tensor can be
copied in blocks of any size. All layouts except transpositions keep the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from megatron_llmjp.convert.files.direct_io import Bytes
from megatron_llmjp.convert.strided_view import StridedView

MIN_RUN_BYTES = 512
"""Shortest run that is copied separately; shorter ones are cheaper to rearrange by torch."""

_FEW_RUNS = 8


@dataclass(frozen=True)
class ContiguousRuns:
    """A stored part: runs of ``length`` elements at ascending places of the canonical tensor."""

    starts: np.ndarray[Any, np.dtype[np.int64]]
    length: int

    @property
    def size(self) -> int:
        """Number of elements of the part."""
        return len(self.starts) * self.length

    def elements_before(self, position: int) -> int:
        """Return how many of the part's elements precede an element of the canonical tensor."""
        count = int(np.searchsorted(self.starts, position))
        if count == 0:
            return 0
        inside = position - int(self.starts[count - 1])
        return (count - 1) * self.length + min(self.length, inside)

    def range_of(self, begin: int, end: int) -> tuple[int, int]:
        """Return which range of the part is stored in a range of the canonical tensor."""
        return self.elements_before(begin), self.elements_before(end)

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start in the canonical tensor, start in the part, elements) of a part's range."""
        while first < last:
            run, inside = divmod(first, self.length)
            count = min(self.length - inside, last - first)
            yield int(self.starts[run]) + inside, first, count
            first += count

    def gather(self, block: Bytes, begin: int, first: int, itemsize: int, packed: Bytes) -> None:
        """Copy a range of the part from a block of the canonical tensor into ``packed``.

        Args:
            block: bytes of the canonical tensor.
            begin: element of the canonical tensor at which the block starts.
            first: first element of the range of the part.
            itemsize: bytes per element.
            packed: bytes of the range, to be filled.
        """
        for inner, outer in self._views(block, begin, first, itemsize, packed):
            outer[...] = inner

    def scatter(self, block: Bytes, begin: int, first: int, itemsize: int, packed: Bytes) -> None:
        """Copy a range of the part into a block of the canonical tensor; see :meth:`gather`."""
        for inner, outer in self._views(block, begin, first, itemsize, packed):
            inner[...] = outer

    def _views(
        self, block: Bytes, begin: int, first: int, itemsize: int, packed: Bytes
    ) -> Iterator[tuple[Bytes, Bytes]]:
        """Yield pairs of views of the block and of ``packed`` with the same bytes."""
        last = first + len(packed) // itemsize
        low, high = -(-first // self.length), last // self.length  # complete runs
        width, count, step = self.length * itemsize, high - low, self._even_step(low, high)
        if step:
            start = (int(self.starts[low]) - begin) * itemsize
            place = (low * self.length - first) * itemsize
            inner = as_strided(block[start:], (count, width), (step * itemsize, 1))
            yield inner, packed[place : place + count * width].reshape(count, width)
            ranges = [(first, low * self.length), (high * self.length, last)]
        else:
            ranges = [(first, last)]
        for at, part, elements in chain.from_iterable(self.pieces(*found) for found in ranges):
            source, target = (at - begin) * itemsize, (part - first) * itemsize
            nbytes = elements * itemsize
            yield block[source : source + nbytes], packed[target : target + nbytes]

    def _even_step(self, low: int, high: int) -> int:
        """Return the distance of the runs ``low`` to ``high``; 0 if it varies, or for few runs."""
        if high - low < _FEW_RUNS:
            return 0
        steps = np.diff(self.starts[low:high])
        return int(steps[0]) if (steps == steps[0]).all() else 0


def find_runs(view: StridedView, itemsize: int) -> ContiguousRuns | None:
    """Return the runs of a view of a contiguous tensor.

    Args:
        view: the view.
        itemsize: bytes per element.

    Returns:
        None if the view changes the order of the elements, or its runs are short.
    """
    if view.numel() == 0:
        return None
    length = 1
    outer: list[tuple[int, int]] = []
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size == 1:
            continue
        if not outer and stride == length:
            length *= size
        else:
            outer.append((size, stride))
    if outer and length * itemsize < MIN_RUN_BYTES:
        return None
    starts = np.array([view.offset], np.int64)
    for size, stride in reversed(outer):
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    if (np.diff(starts) < length).any():
        return None
    return ContiguousRuns(starts, length)
