"""Even interleaving of datasets, in closed form; does not import torch.

Sample ``k`` of a dataset with ``s`` samples has the key ``(2 k + 1) h``, where ``h`` is 2^61 / s
rounded down: the samples of each dataset divide the interval from 0 to 2^62 evenly. A fold takes
the samples of all its datasets by ascending key, equal keys in the order of the datasets. This is
the apportionment method of Webster and Sainte-Laguë: every prefix of a fold follows the blend, and
the samples among the first ``n`` of the fold follow from ``n`` without its predecessors.

megatron-core's rule (the dataset with the largest deficit is next, ``indices/interleave.py``) has
no such form: its state after ``n`` samples depends on all decisions before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

_BLOCK = 2048
"""Positions computed together."""
_KEPT_BLOCKS = 8
_END = 1 << 62


class EvenInterleave:
    """Interleaving of datasets with ``sizes[d]`` samples each; some may have none."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.total = sum(sizes)
        self._sizes = np.array(sizes, np.int64)
        self._half = (_END // 2) // np.maximum(self._sizes, 1)
        self._block = lru_cache(maxsize=_KEPT_BLOCKS)(self._compute_block)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the dataset of a position of the fold, and the sample's number in its slice.

        Raises:
            IndexError: the position is outside the fold.
        """
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} of {self.total:,}")
        datasets, numbers = self._block(position // _BLOCK)
        inside = position % _BLOCK
        return int(datasets[inside]), int(numbers[inside])

    def order(self, first: int, end: int) -> tuple[Numbers, Numbers]:
        """Return the datasets and sample numbers of the positions ``[first, end)``."""
        low, done = self._state_before(first)
        high, _ = self._state_before(end, past=True)
        begin, counts = self._counts(low), self._counts(high) - self._counts(low)
        datasets = np.repeat(np.arange(len(counts)), counts)
        before = np.cumsum(counts) - counts
        numbers = np.arange(len(datasets)) + np.repeat(begin - before, counts)
        keys = (2 * numbers + 1) * self._half[datasets]
        # The datasets are in order, so a stable sort leaves equal keys in their order.
        by_key = np.argsort(keys, kind="stable")[first - done : end - done]
        return datasets[by_key], numbers[by_key]

    def counts(self, position: int) -> Numbers:
        """Return the samples of each dataset among the first ``position`` of the fold."""
        low, done = self._state_before(position)
        datasets, _ = self.order(done, position)
        return self._counts(low) + np.bincount(datasets, minlength=len(self._sizes))

    def positions(self, dataset: int, numbers: Numbers) -> Numbers:
        """Return the positions of samples of a dataset, by their numbers in its slice."""
        keys = (2 * numbers + 1) * self._half[dataset]
        found = np.zeros(len(numbers), np.int64)
        for other, (size, half) in enumerate(zip(self._sizes, self._half, strict=True)):
            # Of equal keys, those of earlier datasets come first.
            found += _count_below(keys + (other < dataset), size, half)
        return found

    def _compute_block(self, block: int) -> tuple[Numbers, Numbers]:
        return self.order(block * _BLOCK, min((block + 1) * _BLOCK, self.total))

    def _counts(self, key: int) -> Numbers:
        """Return the samples of each dataset with smaller keys than ``key``."""
        return _count_below(np.int64(key), self._sizes, self._half)

    def _state_before(self, position: int, past: bool = False) -> tuple[int, int]:
        """Return a key with at most ``position`` samples below it, and their exact number.

        With ``past``, at least ``position`` samples are below it. The key is close: rounding moves
        each dataset by at most one sample from its share.
        """
        slack = max(1, _END * len(self._sizes) // max(1, self.total))
        key = _END * position // max(1, self.total) + (slack if past else -slack)
        while True:
            key = min(max(key, 0), _END)
            done = int(self._counts(key).sum())
            if done >= position if past else done <= position:
                return key, done
            key += slack if past else -slack


def _count_below(key: npt.ArrayLike, size: npt.ArrayLike, half: npt.ArrayLike) -> Numbers:
    """Return the number of k in ``[0, size)`` with ``(2 k + 1) half < key``."""
    ceiling = -(-np.asarray(key, np.int64) // np.asarray(half, np.int64))
    return np.minimum(np.asarray(size, np.int64), ceiling // 2)
