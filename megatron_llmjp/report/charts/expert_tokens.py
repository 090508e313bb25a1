"""Tokens of each expert in a run's report: a map of layers and experts, and a table of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.metric_registry import EXPERT_TOKENS, EXPERT_TOKENS_FILE, ITERATION
from megatron_llmjp.report.html_page import html_table
from megatron_llmjp.report.json_lines import parse_object

FULL = 2.0
"""Load from which a cell has the full colour."""
ROW_HEIGHT = 12


@dataclass(frozen=True)
class ExpertTokens:
    """Tokens of each expert in the log interval that ended with an iteration."""

    iteration: int
    layers: Mapping[int, Sequence[int]]
    """Counts by layer, from 1."""


def read_expert_tokens(folder: Path) -> ExpertTokens | None:
    """Read the counts of a save folder; None if there are none, or the file is damaged."""
    try:
        text = (folder / EXPERT_TOKENS_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = parse_object(text) or {}
    iteration, layers = found.get(ITERATION), found.get(EXPERT_TOKENS)
    if not isinstance(iteration, int) or not isinstance(layers, dict) or not layers:
        return None
    if not all(layer.isdecimal() and _are_counts(counts) for layer, counts in layers.items()):
        return None
    return ExpertTokens(iteration, {int(layer): counts for layer, counts in layers.items()})


def expert_tables(folder: Path) -> Iterator[str]:
    """Yield the section of the report of a run with experts, as HTML."""
    found = read_expert_tokens(folder)
    if found is None:
        return
    rows = []
    for layer, counts in found.layers.items():
        mean = sum(counts) / len(counts) or 1.0
        unused = sum(count == 0 for count in counts)
        loads = (f"{extreme / mean:.2f}" for extreme in (min(counts), max(counts)))
        rows.append([f"layer {layer}", f"{sum(counts):,}", f"{mean:,.0f}", *loads, f"{unused:,}"])
    heads = ["", "tokens", "per expert", "least / mean", "most / mean", "experts without tokens"]
    yield (
        f"<details><summary>Tokens per expert (log interval to iteration {found.iteration:,})"
        f"</summary>\n<p>A row for each layer with experts, a column for each expert; the darker, "
        f"the more tokens, up to {FULL:g} times the mean.</p>\n{_map(found)}\n"
        f"{html_table(heads, rows)}\n</details>"
    )


def _map(found: ExpertTokens) -> str:
    """Draw a row of cells for each layer, in the page's colours."""
    width = max(len(counts) for counts in found.layers.values())
    height = len(found.layers) * ROW_HEIGHT
    rows = "\n".join(
        f"<g><title>layer {layer}</title>{_cells(counts, number * ROW_HEIGHT)}</g>"
        for number, (layer, counts) in enumerate(found.layers.items())
    )
    return (
        f'<svg role="img" aria-label="tokens per expert" viewBox="0 0 {width} {height}" '
        f'preserveAspectRatio="none" style="width: 100%; height: {height}px; fill: var(--c0); '
        f'background: var(--grid)">\n{rows}\n</svg>'
    )


def _cells(counts: Sequence[int], y: int) -> str:
    mean = sum(counts) / len(counts) or 1.0
    return "".join(
        f'<rect x="{x}" y="{y}" width="1" height="{ROW_HEIGHT - 1}" '
        f'fill-opacity="{min(1.0, count / mean / FULL):.2f}"/>'
        for x, count in enumerate(counts)
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_count, values))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
