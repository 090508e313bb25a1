"""CRC-32 of file ranges, computed while they are read, and CRC-32 of concatenated data.

A :class:`ChecksumRange` is a range of a file with a known CRC-32: a whole file listed in a
manifest, or an entry of a zip archive. Readers pass it the bytes that they read; the CRC-32s of the
parts are combined, so that no byte is read twice. ``finish`` reads the parts that were not read
by then.

A CRC is the remainder of a polynomial over GF(2): appending n bytes multiplies the previous CRC by
x^(8 n) modulo the generator. Bits are reflected, as in zip (APPNOTE 6.3) and zlib.
"""

from __future__ import annotations

import threading
import zlib
from functools import lru_cache
from pathlib import Path

from megatron_llmjp.errors import UserError

_GENERATOR = 0xEDB88320
_ONE = 1 << 31
"""The polynomial 1, bits reflected."""

_BLOCK = 1 << 22


def _multiply(a: int, b: int) -> int:
    """Return the product of two polynomials modulo the generator."""
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
    """Return x^(8 count) modulo the generator."""
    result, square, exponent = _ONE, _ONE >> 1, 8 * count
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        exponent >>= 1
    return result


def combine_crc32(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two concatenated byte strings.

    Args:
        first: CRC-32 of the first string.
        second: CRC-32 of the second string.
        length: bytes of the second string.
    """
    return _multiply(_power(length), first) ^ second


class ChecksumRange:
    """A range of a file with one expected CRC-32; thread-safe."""

    def __init__(self, path: Path, start: int, length: int, crc: int, origin: str) -> None:
        self.path, self.start, self.length = path, start, length
        self._crc, self._origin = crc, origin
        self._pieces: dict[int, tuple[int, int]] = {}
        self._overlap = self._checked = False
        self._added = 0
        self.is_skipped = False
        """Whether another process verifies the range."""
        self._lock = threading.Lock()

    def add(self, offset: int, data: memoryview) -> int | None:
        """Add bytes that were read at an offset of the file; check the CRC-32 once all were added.

        Returns:
            The CRC-32 of the bytes; None if they had been added before.

        Raises:
            UserError: the CRC-32 is not the expected one.
        """
        if self.is_skipped:
            return None
        with self._lock:
            known = self._pieces.get(offset)
        if known is not None and known[0] == len(data):
            return None
        crc = zlib.crc32(data)
        with self._lock:
            before = self._pieces.get(offset, (0, 0))[0]
            self._overlap |= before not in (0, len(data))
            self._pieces[offset] = (len(data), crc)
            self._added += len(data) - before
            complete = self._added == self.length
        if complete:
            self.finish()
        return crc

    def finish(self) -> None:
        """Read the bytes that were not added yet, and check the CRC-32.

        Raises:
            UserError: the CRC-32 is not the expected one, or the file cannot be read.
        """
        if self._checked or self.is_skipped:
            return
        if self._total() != self._crc:
            raise UserError(
                f"{self.path}: damaged: its content does not match the checksum in {self._origin}; "
                "restore the file from a copy, or use another checkpoint"
            )
        self._checked = True

    def _total(self) -> int:
        pieces = sorted(self._pieces.items())
        ends = [start + length for start, (length, _) in pieces]
        starts = [start for start, _ in pieces[1:]]
        if self._overlap or any(end > start for end, start in zip(ends, starts, strict=False)):
            pieces = []  # overlapping parts cannot be combined: read all bytes again
        total, position = 0, self.start
        try:
            with self.path.open("rb", buffering=0) as stream:
                for start, (length, crc) in [*pieces, (self.start + self.length, (0, 0))]:
                    stream.seek(position)
                    while position < start:
                        block = stream.read(min(_BLOCK, start - position))
                        if not block:
                            raise UserError(f"{self.path}: truncated at {position} bytes")
                        total = zlib.crc32(block, total)
                        position += len(block)
                    total = combine_crc32(total, crc, length)
                    position += length
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error
        return total
