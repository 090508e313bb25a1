"""Formatting of counts, sizes, durations, lists and tables for people."""

from __future__ import annotations

import unicodedata
from collections.abc import Container, Iterable, Sequence


def format_count(number: float) -> str:
    """Format a count: 1234567 -> 1.23M."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def format_tick(number: float) -> str:
    """Format a tick label of a plot axis: 1500000 -> 1.5M, 0.25 -> 0.25."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def format_ranks(ranks: Iterable[int]) -> str:
    """Format rank numbers: ``rank 4``, ``ranks 0-3, 8``."""
    numbers = list(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(format_ranges(numbers))}"


def format_ranges(numbers: Iterable[int]) -> list[str]:
    """Format numbers by ranges in ascending order: ``0-3``, ``8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def format_duration(seconds: float) -> str:
    """Format seconds as ``1d 02:03:04``."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


def format_bytes(size: float) -> str:
    """Format bytes as ``2.41 TB``, ``180.0 GB`` or ``3.2 MB`` (10^12, 10^9, 10^6)."""
    if size >= 1e12:
        return f"{size / 1e12:.2f} TB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def format_gigabytes(size: float) -> str:
    """Format bytes as ``1,011.06 GB`` (10^9)."""
    return f"{size / 1e9:,.2f} GB"


def format_names(names: Sequence[str], most: int = 3) -> str:
    """Format the first names of a list and the number of the others."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def text_width(text: str) -> int:
    """Return the columns of a text in a terminal, where CJK characters take two."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    combining = sum(unicodedata.combining(character) > 0 for character in text)
    return len(text) + wide - combining


def shorten(text: str, columns: int) -> str:
    """Shorten a text to a number of columns, with an ellipsis at its end."""
    if text_width(text) <= columns:
        return text
    while text and text_width(text) >= columns:
        text = text[:-1]
    return f"{text}…" if columns > 0 else ""


def format_table(rows: Sequence[Sequence[str]], right: Container[int]) -> str:
    """Format rows of cells as aligned text; the columns in ``right`` are right-aligned."""
    widths = [max(map(text_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            " " * (width - text_width(cell)) + cell
            if i in right
            else cell + " " * (width - text_width(cell))
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
