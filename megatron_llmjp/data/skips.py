"""Samples to leave out: numbers of positions, and of the samples that remain between them.

A *position* is a sample's number in the schedule; it depends on the fold file and its seed alone.
Leaving samples out moves no position: it only decides which position the next step trains on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Skips:
    """Positions left out, as half-open ranges in order that neither touch nor overlap."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Skips:
        """Sort ranges and join those that touch or overlap; empty ones vanish."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted((a, b) for a, b in ranges if a < b):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], end))
            else:
                joined.append((start, end))
        return cls(tuple(joined))

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def and_also(self, ranges: Iterable[tuple[int, int]]) -> Skips:
        """These and more."""
        return Skips.of([*self.ranges, *ranges])

    def position(self, number: int) -> int:
        """The position of trained sample ``number``: that of this number among those kept."""
        position = number
        for start, end in self.ranges:
            if start > position:
                break
            position += end - start
        return position

    def kept_before(self, position: int) -> int:
        """How many positions below ``position`` are kept; the inverse of :meth:`position`."""
        return position - sum(max(0, min(b, position) - a) for a, b in self.ranges)

    def kept(self, start: int, end: int) -> int:
        """How many of the positions ``[start, end)`` are kept."""
        return max(0, self.kept_before(end) - self.kept_before(start))

    def before(self, position: int) -> Skips:
        """The part of them below ``position``."""
        return Skips.of((a, min(b, position)) for a, b in self.ranges)


NOTHING_SKIPPED = Skips()
