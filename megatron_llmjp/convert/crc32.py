"""The CRC-32 of bytes end to end, from those of the pieces.

A CRC is a remainder of polynomials over GF(2): appending n bytes multiplies the one before by
x^(8 n) modulo the generator. Bits are reflected, as in zip (APPNOTE 6.3) and zlib.
"""

from __future__ import annotations

from functools import lru_cache

_GENERATOR = 0xEDB88320
_ONE = 1 << 31
"""The polynomial 1."""


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo the generator."""
    product = 0
    bit = _ONE
    while bit:
        if a & bit:
            product ^= b
        bit >>= 1
        b = (b >> 1) ^ _GENERATOR if b & 1 else b >> 1
    return product


@lru_cache(maxsize=4096)
def _power(count: int) -> int:
    """x^(8 count) modulo the generator."""
    result, square, exponent = _ONE, _ONE >> 1, 8 * count
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        exponent >>= 1
    return result


def joined(first: int, second: int, length: int) -> int:
    """The CRC-32 of two pieces end to end, from theirs and the second one's bytes."""
    return _multiply(_power(length), first) ^ second
