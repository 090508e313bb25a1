"""HTML page of a summary: tables and plots of sizes and document lengths."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from data_tools.statistics.counts import TextCounts
from data_tools.statistics.summary import Summary
from data_tools.statistics.tables import count_cells, removed_rows, summary_rows
from megatron_llmjp.formatting import format_count, format_tick
from megatron_llmjp.report.html_page import embedded_image, html_facts, html_page, html_table
from megatron_llmjp.report.plots import COLORS, FONTS, STYLE

MAX_BARS = 40
"""Bars in a plot; the largest are shown."""
MAX_LINES = 8
"""Languages with a histogram of their own."""
_LEVELS = (("dataset", "Datasets"), ("language", "Languages"), ("source", "Source files"))
_Rows = list[tuple[dict[str, str], TextCounts]]


def format_page(summary: Summary) -> str:
    """Return a self-contained page."""
    rows = list(summary_rows(summary))
    total, names = summary.total, [dataset.name for dataset in summary.datasets]
    title = Path(names[0]).name if len(names) == 1 else f"{len(names):,} datasets"
    parts = [html_facts([*_facts(total), *(("warning", text) for text in summary.warnings)])]
    for level, heading in _LEVELS:
        of_level = _of_level(rows, level)
        if of_level:
            cells = [[name, *map(_cell, count_cells(counts).values())] for name, counts in of_level]
            heads = [level, *(head.replace("_", " ") for head in count_cells(total))]
            parts += [f"<h2>{heading}</h2>", html_table(heads, cells)]
    if removed := removed_rows(summary):
        cells = [[*map(_cell, row.values())] for row in removed]
        parts += [
            "<h2>Documents removed at preprocessing</h2>",
            html_table(list(removed[0]), cells),
        ]
    subtitle = f"{format_count(total.documents)} documents, {format_count(total.tokens)} tokens"
    known = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [name for name in FONTS if name in known]
    with rc_context({**STYLE, "font.family": fonts}), warnings.catch_warnings():
        # Names may be Japanese: the page uses the fonts of the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        images = [embedded_image(figure, name) for name, figure in _plots(rows)]
    return html_page(title, subtitle, parts, images)


def _facts(total: TextCounts) -> Iterator[tuple[str, str]]:
    for name, value in count_cells(total).items():
        yield name.replace("_", " "), _cell(value) or "unknown"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"


def _of_level(rows: _Rows, level: str) -> list[tuple[str, TextCounts]]:
    return [(key.get(level) or "(unknown)", counts) for key, counts in rows if key["by"] == level]


def _plots(rows: _Rows) -> Iterator[tuple[str, Figure]]:
    """Yield title and figure of each plot that has values."""
    groups = _of_level(rows, "language") or _of_level(rows, "dataset")
    yield "Document lengths", draw_lengths([("all", rows[0][1]), *_largest(groups, MAX_LINES)])
    for level, heading in _LEVELS:
        of_level = _of_level(rows, level)
        if len(of_level) > 1:
            tokens = [(name, float(counts.tokens)) for name, counts in of_level]
            yield f"Tokens: {heading.lower()}", draw_bars(f"Tokens: {heading.lower()}", tokens)
        ratios = [(name, counts.bytes_per_token) for name, counts in of_level]
        known = [(name, ratio) for name, ratio in ratios if ratio is not None]
        if len(known) > 1:
            title = f"UTF-8 bytes per token: {heading.lower()}"
            yield title, draw_bars(title, known)


def _largest(rows: Sequence[tuple[str, TextCounts]], most: int) -> list[tuple[str, TextCounts]]:
    """Return the rows with the most tokens; none if there is only one row."""
    ordered = sorted(rows, key=lambda row: -row[1].tokens)
    return ordered[:most] if len(rows) > 1 else []


def draw_lengths(rows: Sequence[tuple[str, TextCounts]]) -> Figure:
    """Plot the share of documents by length, one line per row, the first one filled."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, counts) in enumerate(rows):
        if not counts.documents:
            continue
        edges = [0.5, *(2.0**at for at in range(len(counts.histogram)))]
        shares = [count / counts.documents for count in counts.histogram]
        color = "#c9d6e2" if number == 0 else COLORS[(number - 1) % len(COLORS)]
        axes.stairs(shares, edges, fill=number == 0, color=color, label=name, linewidth=1.4)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens per document (empty documents below 1)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_ylabel("share of documents")
    axes.set_title("Document lengths")
    if len(rows) > 1:
        axes.legend(ncols=1 if len(rows) < 6 else 2)
    return figure


def draw_bars(title: str, rows: Sequence[tuple[str, float]]) -> Figure:
    """Plot one horizontal bar per row, in descending order; the largest if there are many."""
    shown = sorted(rows, key=lambda row: -row[1])[:MAX_BARS]
    omitted = f" (the largest {MAX_BARS} of {len(rows):,})" if len(rows) > MAX_BARS else ""
    figure = Figure(figsize=(6.0, 1.0 + 0.22 * max(len(shown), 4)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(places, [value for _, value in shown], color=COLORS[0], height=0.7)
    axes.set_yticks(places, [_shortened(name) for name, _ in shown])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axes.set_title(title + omitted)
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= 40 else f"...{name[-37:]}"
