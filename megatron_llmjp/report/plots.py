"""Plots of a run's report, drawn by matplotlib without a display.

The plots of single metrics are the panels of the metric registry.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megatron_llmjp.formatting import format_tick
from megatron_llmjp.metric_panels import THROUGHPUT_PANEL, Panel
from megatron_llmjp.metric_registry import (
    CONSUMED_SAMPLES,
    ITERATION,
    LM_LOSS,
    MFU,
    TOKENS_PER_SECOND,
    Metric,
)
from megatron_llmjp.report.charts.shown_panels import shown_panels
from megatron_llmjp.report.history import MetricsHistory

COLORS = ("#1f5a8c", "#d1772a", "#3f8f5f", "#9a4f8e", "#b8a12c", "#4aa5b8", "#a34a3f", "#6f6f6f")
"""Line colors, distinguishable with color blindness."""
INK, EDGE, BOUNDARY, FAINT, RESTART = "#333333", "#b5b5b5", "#c4c4c4", "#8a8a8a", "#c0392b"

FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "IPAexGothic",
    "IPAGothic",
    "VL Gothic",
    "Hiragino Sans",
    "Yu Gothic",
)
"""Fonts to use if installed; names of folds and validation sets may be Japanese."""

STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": EDGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 8.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # names of folds may contain dollar signs
    "svg.fonttype": "none",  # text in the browser's fonts
    "svg.hashsalt": "megatron_llmjp",  # the same run gives the same file
    "path.simplify": True,
}


MAX_POINTS = 1200
"""Number of points per line; longer lines show the mean and range of that many groups."""


def draw_all(history: MetricsHistory) -> Iterator[tuple[str, str, Figure]]:
    """Yield name, title and figure of each plot that the run has values for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    known = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [name for name in FONTS if name in known]
    with rc_context({**STYLE, "font.family": fonts}):
        yield "loss", "Loss", draw_loss(history)
        if any(len(iterations) > 1 for iterations, _ in history.validation_sets().values()):
            yield "validation", "Validation loss", draw_validation(history)
        for panel, metrics in shown_panels([history]):
            yield panel.name, panel.title, draw_panel(panel, metrics, history)
        datasets = history.consumed_by_dataset()
        if datasets:
            yield "datasets", "Consumed tokens per dataset", draw_datasets(history, datasets)


def png_image(figure: Figure, dpi: int = 130) -> bytes:
    """Return a plot as a PNG file. ``figure.savefig`` would draw it twice."""
    figure.dpi = dpi
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def draw_loss(history: MetricsHistory) -> Figure:
    """Plot the training and validation losses with folds, restarts and abandoned intervals."""
    figure, axes = _new_figure((10.0, 4.6))
    iterations, losses = history.values(LM_LOSS.name)
    _draw_line(axes, iterations, losses, COLORS[0], "training")
    for number, abandoned in enumerate(history.abandoned):
        known = [r for r in abandoned if r[LM_LOSS.name] is not None]
        x, y = [int(r[ITERATION]) for r in known], [float(r[LM_LOSS.name]) for r in known]
        label = "repeated after a restart" if number == 0 else None
        axes.plot(x, y, color=FAINT, linewidth=1.0, linestyle=":", label=label)
    sets = history.validation_sets()
    for (name, (x, y)), color in zip(sets.items(), cycle(COLORS[1:]), strict=False):
        axes.plot(x, y, "o", color=color, markersize=4, label=f"validation {name}")
    _limit_loss(axes, losses, [loss for _, y in sets.values() for loss in y])
    axes.set_ylabel("nats per token")
    named = _mark_folds_and_restarts(axes, history, names=True)
    axes.set_title("Loss", pad=20 if named else 8)
    _add_token_axis(axes, history)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()
    return figure


def draw_validation(history: MetricsHistory) -> Figure:
    """Plot the loss of each validation set."""
    figure, axes = _new_figure()
    sets = history.validation_sets()
    for (name, (x, y)), color in zip(sets.items(), cycle(COLORS[1:]), strict=False):
        axes.plot(x, y, "o-", color=color, markersize=3.5, label=name)
    axes.set_ylabel("nats per token")
    axes.set_title("Validation loss")
    axes.margins(y=0.12)
    _mark_folds_and_restarts(axes, history)
    axes.legend(ncols=1 if len(sets) < 6 else 2)
    return figure


def draw_panel(panel: Panel, metrics: Sequence[Metric], history: MetricsHistory) -> Figure:
    """Plot the metrics of a panel over iterations."""
    figure, axes = _new_figure()
    top = 0.0
    for metric, color in zip(metrics, cycle(COLORS), strict=False):
        iterations, values = history.values(metric.name)
        values = [value * metric.scale for value in values]
        _draw_line(axes, iterations, values, color, metric.label)
        top = max([top, *filter(math.isfinite, values)])
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    if panel.from_zero:
        axes.set_ylim(0, 1.12 * top)
    if panel.log_scale:
        _log_scale(axes)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    if panel is THROUGHPUT_PANEL:
        _add_mfu(axes, history)
    _mark_folds_and_restarts(axes, history)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="lower right")
    return figure


def _add_mfu(axes: Any, history: MetricsHistory) -> None:
    """Add an axis with the MFU, which is proportional to the throughput."""
    records = [r for r in history.training if r.get(MFU.name) and r.get(TOKENS_PER_SECOND.name)]
    pairs = [(r[MFU.name], r[TOKENS_PER_SECOND.name]) for r in records]
    if pairs:
        each = 100.0 * median(mfu / speed for mfu, speed in pairs)
        scale = axes.secondary_yaxis("right", functions=(lambda v: v * each, lambda v: v / each))
        scale.set_ylabel("MFU (%)")
        scale.spines["right"].set_visible(True)


def _log_scale(axes: Any) -> None:
    """Use a logarithmic scale with ticks at 1, 2 and 5 times the powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))


def draw_datasets(
    history: MetricsHistory, datasets: dict[str, tuple[list[int], list[float]]]
) -> Figure:
    """Plot the consumed tokens of each dataset."""
    figure, axes = _new_figure()
    order = sorted(datasets, key=lambda name: -datasets[name][1][-1])
    for name, color in zip(order, cycle(COLORS), strict=False):
        axes.plot(*datasets[name], color=color, label=name)
    axes.set_title("Consumed tokens per dataset")
    axes.set_ylabel("tokens")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    _mark_folds_and_restarts(axes, history)
    axes.legend(loc="upper left", ncols=1 if len(order) < 8 else 2)
    return figure


def _new_figure(size: tuple[float, float] = (6.0, 3.4)) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure, axes


def _draw_line(
    axes: Any, iterations: Sequence[int], values: Sequence[float], color: str, label: str
) -> None:
    """Draw a line of the finite values; for a long one the means, with the ranges as a band."""
    x, y = np.asarray(iterations, float), np.asarray(values, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    label = label or "_"
    if len(x) <= MAX_POINTS:
        marker = "o" if len(x) == 1 else None
        axes.plot(x, y, color=color, label=label, marker=marker)
        return
    starts = np.linspace(0, len(x), MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(x)))
    middle = np.add.reduceat(x, starts) / counts
    low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    axes.fill_between(middle, low, high, color=color, alpha=0.25, linewidth=0)
    axes.plot(middle, np.add.reduceat(y, starts) / counts, color=color, label=label)


def _limit_loss(axes: Any, losses: Sequence[float], validation: Sequence[float]) -> None:
    """Limit the y axis to the loss after the initial drop, for runs of at least 200 points."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 200:
        axes.margins(y=0.08)
        return
    shown = finite[len(finite) // 50 :] + [loss for loss in validation if math.isfinite(loss)]
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))


def _mark_folds_and_restarts(axes: Any, history: MetricsHistory, names: bool = False) -> bool:
    """Mark fold boundaries and restarts; return whether names of folds were drawn."""
    spans = history.folds()
    first, last = 0, max(history.iteration, 1)
    axes.set_xlim(first, last + 0.02 * (last - first))
    for span in spans[1:]:
        axes.axvline(span.first, color=BOUNDARY, linestyle="--", linewidth=0.9, zorder=0.5)
    if history.restarts:
        foot = axes.get_xaxis_transform()
        axes.plot(
            history.restarts,
            [0.0] * len(history.restarts),
            "^",
            color=RESTART,
            transform=foot,
            clip_on=False,
            markersize=6,
            label="restart" if names else "_",
            zorder=5,
        )
    return names and _name_folds(axes, history)


def _name_folds(axes: Any, history: MetricsHistory) -> bool:
    """Draw the name of each fold above its range, if there is room."""
    spans, wide = history.folds(), axes.get_xlim()[1] - axes.get_xlim()[0]
    if len(spans) < 2:
        return False
    characters = 125  # that fit above the axes
    for span in spans:
        room = int((span.last - span.first) / wide * characters)
        text = span.name if len(span.name) <= room else span.name[: room - 1] + "…"
        if room >= 3:
            middle = (span.first + span.last) / 2
            axes.text(
                middle, 1.015, text, transform=axes.get_xaxis_transform(),
                ha="center", va="bottom", color=INK, fontsize=8.5,
            )  # fmt: skip
    return True


def _add_token_axis(axes: Any, history: MetricsHistory) -> None:
    """Add a second x axis with the consumed tokens."""
    iterations, samples = history.values(CONSUMED_SAMPLES)
    if history.config is None or len(iterations) < 2:
        return
    tokens = np.asarray(samples) * history.config.data.seq_length
    beyond = 2 * iterations[-1], 2 * tokens[-1] - tokens[0]  # the axis is longer than the run
    x = np.concatenate([[0.0], iterations, beyond[:1]])
    y = np.concatenate([[0.0], tokens, beyond[1:]])
    scale = axes.secondary_xaxis(
        -0.17, functions=(lambda at: np.interp(at, x, y), lambda at: np.interp(at, y, x))
    )
    scale.set_xlabel("tokens")
    scale.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
