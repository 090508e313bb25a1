"""The even interleaving of datasets, compared with a sort of all keys in exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_llmjp.data.folds import even_interleave
from megatron_llmjp.data.folds.even_interleave import EvenInterleave

BLENDS = st.lists(st.integers(0, 25), min_size=1, max_size=7).filter(any)
HUGE = [3, 10**9 + 7, 1, 0, 2**33 + 5, 124_000_000, 124_000_000, *range(1000, 1100)]


def sorted_by_key(sizes: list[int]) -> list[tuple[int, int]]:
    """Return dataset and number of each sample: all keys of the definition, sorted."""
    keys = [
        ((2 * k + 1) * (2**61 // size), dataset, k)
        for dataset, size in enumerate(sizes)
        for k in range(size)
    ]
    return [(dataset, k) for _, dataset, k in sorted(keys)]


@given(BLENDS, st.data())
@example([0, 0, 1], None)
@example([7, 7, 7], None)  # equal keys
def test_every_position_equals_the_sort_of_all_keys(sizes, data):
    expected = sorted_by_key(sizes)
    order = EvenInterleave(sizes)
    assert [order.locate(n) for n in range(len(expected))] == expected
    for dataset, size in enumerate(sizes):
        places = [n for n, (d, _) in enumerate(expected) if d == dataset]
        assert order.positions(dataset, np.arange(size)).tolist() == places
    which = np.array([d for d, _ in expected])
    ends = range(len(expected) + 1)
    for n in (*ends[:: 1 + len(ends) // 20], len(expected)):
        assert order.counts(n).tolist() == np.bincount(which[:n], minlength=len(sizes)).tolist()
    first, end = sorted(data.draw(st.sampled_from(ends)) if data else e for e in (0, 1))
    datasets, numbers = order.order(first, end)
    assert list(zip(datasets.tolist(), numbers.tolist(), strict=True)) == expected[first:end]


@given(BLENDS)
def test_every_prefix_follows_the_blend(sizes):
    """To within half a sample and a dataset's share of half a sample of every dataset."""
    which = np.array([d for d, _ in sorted_by_key(sizes)])
    steps = np.arange(1, len(which) + 1)
    for dataset, size in enumerate(sizes):
        share = size / len(which)
        deviation = np.abs(np.cumsum(which == dataset) - steps * share).max()
        assert deviation <= 1 + share * len(sizes) / 2


def test_any_part_of_a_huge_fold_is_computed_alone():
    order = EvenInterleave(HUGE)
    total = order.total
    assert order.counts(0).tolist() == [0] * len(HUGE)
    assert order.counts(total).tolist() == HUGE
    shares = np.array(HUGE) / total
    for position in (0, 1, 12345, total // 3, total // 2, total - 5000, total - 1):
        counts = order.counts(position)
        assert counts.sum() == position
        assert (np.abs(counts - shares * position) <= 1 + shares * len(HUGE) / 2).all()
        end = min(position + 3000, total)
        datasets, numbers = order.order(position, end)
        assert (np.bincount(datasets, minlength=len(HUGE)) == order.counts(end) - counts).all()
        for dataset in np.unique(datasets):
            mine = numbers[datasets == dataset]
            assert mine.tolist() == list(range(counts[dataset], counts[dataset] + len(mine)))
            places = np.flatnonzero(datasets == dataset) + position
            assert order.positions(int(dataset), mine).tolist() == places.tolist()
        assert order.locate(position) == (datasets[0], numbers[0])


def test_positions_outside_a_fold_are_refused():
    order = EvenInterleave([3, 2])
    for position in (-1, 5):
        with pytest.raises(IndexError, match=rf"position {position} of 5"):
            order.locate(position)


def test_blocks_of_positions_join(monkeypatch):
    monkeypatch.setattr(even_interleave, "_BLOCK", 4)
    sizes = [5, 0, 11, 2]
    order = EvenInterleave(sizes)
    assert [order.locate(n) for n in range(18)] == sorted_by_key(sizes)
