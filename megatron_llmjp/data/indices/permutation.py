"""Pseudo-random permutations that are computed for single elements, without stored tables.

:class:`Permutation` is an alternating Feistel network over the smallest power of two that holds its
domain, restricted to the domain by cycle walking: an image outside is permuted again (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002; Levanter shuffles samples in this way). The
round function is the finalizer of SplitMix64. It is not a cipher, and need not be one.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, overload

import numpy as np
import numpy.typing as npt

ROUNDS = 8
_MASK = (1 << 64) - 1


@overload
def mix64(value: int) -> int: ...
@overload
def mix64(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]: ...
def mix64(value: Any) -> Any:
    """Return the finalizer of SplitMix64: a bijection of 64-bit integers that spreads every bit.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def derive_keys(seed: int, purpose: str, count: int) -> tuple[int, ...]:
    """Return ``count`` (up to 8) 64-bit keys that depend on a seed and on what they are for."""
    digest = hashlib.sha512(f"{seed}/{purpose}".encode()).digest()
    return struct.unpack_from(f"<{count}Q", digest)


def hashed_order(first: int, end: int, key: int) -> npt.NDArray[np.int64]:
    """Return the numbers ``[first, end)`` in a pseudo-random order that depends on ``key``.

    They are sorted by the high bits of a hash, equal ones ascending. The low bits of the sorted
    integers are their places: numpy sorts integers several times faster than it finds an order.
    """
    count = end - first
    place_bits = max(0, count - 1).bit_length()
    places = np.arange(count, dtype=np.uint64)
    hashes = mix64((places + np.uint64(first)) ^ np.uint64(key))
    by_hash = np.sort(hashes >> place_bits << place_bits | places)
    return (by_hash & ((1 << place_bits) - 1)).astype(np.int64) + first


class Permutation:
    """A permutation of ``[0, size)``, determined by a seed."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = bits // 2
        self._low = (1 << self._low_bits) - 1
        self._high = (1 << (bits - self._low_bits)) - 1
        self._keys = derive_keys(seed, "samples", ROUNDS)

    def image(self, number: int) -> int:
        """Return the image of one number."""
        number = self._permute(number)
        while number >= self.size:
            number = self._permute(number)
        return number

    def preimages(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the numbers whose images are given."""
        found = self._invert(numbers.astype(np.uint64))
        while (outside := found >= self.size).any():
            found[outside] = self._invert(found[outside])
        return found.astype(np.int64)

    def _permute(self, number: int) -> int:
        low, high = number & self._low, number >> self._low_bits
        for turn, key in enumerate(self._keys):
            if turn % 2:
                low ^= mix64(high ^ key) & self._low
            else:
                high ^= mix64(low ^ key) & self._high
        return high << self._low_bits | low

    def _invert(self, numbers: npt.NDArray[np.uint64]) -> Any:
        low, high = numbers & self._low, numbers >> self._low_bits
        for turn, key in reversed(list(enumerate(self._keys))):
            if turn % 2:
                low = low ^ mix64(high ^ np.uint64(key)) & self._low
            else:
                high = high ^ mix64(low ^ np.uint64(key)) & self._high
        return high << self._low_bits | low
