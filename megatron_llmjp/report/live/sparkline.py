"""Curves drawn with block characters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = " ▁▂▃▄▅▆▇█"
"""A column of 0 to 8 eighths."""
ASCII = " .:-=+*#@"
"""The same for terminals without Unicode."""
TRIMMED = 50
"""Number of values from which on the limits ignore the initial drop of a loss."""


def sparkline(
    values: Sequence[float], columns: int, rows: int = 1, blocks: str = BLOCKS
) -> list[str]:
    """Draw a curve from its smallest to its largest value.

    Args:
        values: the values; several of one column are averaged.
        columns: largest width.
        rows: height.
        blocks: the characters from empty to full.

    Returns:
        The lines, the top one first; empty without values.
    """
    means = _means(values, columns)
    if not means:
        return []
    low, high = limits(means)
    steps = len(blocks) - 1
    # The smallest value is one step high, so that every column is visible.
    heights = [_height(value, low, high, rows * steps) for value in means]
    return [
        "".join(blocks[min(steps, max(0, height - row * steps))] for height in heights)
        for row in reversed(range(rows))
    ]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the limits of a curve; of long ones without the first 2 percent."""
    shown = values[max(1, len(values) // 50) :] if len(values) >= TRIMMED else values
    return min(shown), max(shown)


def _height(value: float, low: float, high: float, steps: int) -> int:
    if high <= low:
        return 1 + (steps - 1) // 2
    share = (min(max(value, low), high) - low) / (high - low)
    return 1 + round(share * (steps - 1))


def _means(values: Sequence[float], columns: int) -> list[float]:
    count = min(len(values), columns)
    bounds = [len(values) * number // max(count, 1) for number in range(count + 1)]
    return [sum(values[first:end]) / (end - first) for first, end in pairwise(bounds)]
