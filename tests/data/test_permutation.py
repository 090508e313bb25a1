"""Pseudo-random permutations, compared with published values and with uniform ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llmjp.data.indices.permutation import Permutation, hashed_order, mix64

SPLITMIX64 = [
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
    16408922859458223821,
]  # fmt: skip
"""First outputs of SplitMix64 with seed 1234567, as its implementations publish them."""


def test_the_mixing_function_is_that_of_splitmix64():
    states = [(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(1, 6)]
    assert [mix64(state) for state in states] == SPLITMIX64
    assert mix64(np.array(states, np.uint64)).tolist() == SPLITMIX64


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_it_is_a_permutation_with_an_inverse(size, seed):
    permutation = Permutation(size, seed)
    images = [permutation.image(n) for n in range(size)]
    assert sorted(images) == list(range(size))
    assert permutation.preimages(np.array(images)).tolist() == list(range(size))


def test_large_domains():
    permutation = Permutation(10**12 + 39, 7)
    numbers = np.array([0, 1, 2, 10**11, 10**12])
    images = np.array([permutation.image(int(n)) for n in numbers])
    assert permutation.preimages(images).tolist() == numbers.tolist()
    assert len(set(images.tolist())) == 5 and images.max() < 10**12 + 39


@pytest.mark.parametrize("size", [16, 50, 61])
def test_images_are_uniform_and_neighbours_independent(size):
    """Chi-squared tests over seeds; the limits are 5 standard deviations from the mean."""
    seeds = 4000
    images = np.array([[Permutation(size, s).image(n) for n in (0, 1, size - 1)]
                       for s in range(seeds)])  # fmt: skip
    for column in images.T:
        assert chi_squared(np.bincount(column, minlength=size)) < limit(size - 1)
    steps = (images[:, 1] - images[:, 0]) % size  # never 0
    assert chi_squared(np.bincount(steps, minlength=size)[1:]) < limit(size - 2)


def test_blocks_are_shuffled_uniformly():
    first = np.array([hashed_order(96, 128, key)[0] for key in range(0, 2**40, 2**28)])
    assert chi_squared(np.bincount(first - 96, minlength=32)) < limit(31)
    assert sorted(hashed_order(96, 128, 5)) == list(range(96, 128))


def chi_squared(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def limit(freedom: int) -> float:
    return freedom + 5 * (2 * freedom) ** 0.5
