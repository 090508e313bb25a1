"""Data of an interactive page: panels, and the curves and marks of each run, as JSON.

The page contains one JSON object with the keys ``panels`` and ``runs``. A panel has a ``name``,
``title``, ``unit``, flags, and ``curves``, each with a ``key``, ``label`` and ``style``: ``line``,
``points``, ``marked`` (a line with points) or ``dotted``. A run has a ``name``, ``folds``,
``marks``, ``counts`` of marks, ``tokens`` (iterations, and the tokens consumed until then), and
``curves`` by key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_llmjp.metric_registry import (
    CONSUMED_TOKENS,
    DATASET_LOSS,
    DATASET_TOKENS,
    ITERATION,
    LM_LOSS,
    METRICS,
    MFU,
    VALIDATION_LOSS,
)
from megatron_llmjp.report.charts.decimation import Curve, reduce_curve
from megatron_llmjp.report.charts.marks import count_marks, find_marks, limit_marks
from megatron_llmjp.report.charts.shown_panels import shown_panels
from megatron_llmjp.report.history import JsonRecord, MetricsHistory

REPEATED = "repeated"
"""Key of the intervals that were repeated after a restart."""
MAX_FOLDS = 1000
TOKEN_POINTS = 500
"""Points of the conversion from iterations to tokens."""

_Points = tuple[list[int], list[float]]


def page_data(runs: Sequence[MetricsHistory], names: Sequence[str]) -> dict[str, Any]:
    """Return the data of a page with one or several runs.

    Args:
        runs: the runs.
        names: their names in the page.
    """
    panels = list(_panels(runs))
    keys = {curve["key"] for panel in panels for curve in panel["curves"]}
    return {
        "panels": panels,
        "runs": [_run(run, name, keys) for run, name in zip(runs, names, strict=True)],
    }


def script_json(data: dict[str, Any]) -> str:
    """Return JSON for a ``script`` element, which no text in it can end."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _panels(runs: Sequence[MetricsHistory]) -> Iterator[dict[str, Any]]:
    """Yield the panels, the loss first."""
    sets = _names(runs, VALIDATION_LOSS.prefix, validation=True)
    loss = [_curve(LM_LOSS.name, "training"), _curve(REPEATED, "repeated", "dotted")]
    loss += [_curve(key, f"validation {name}", "points") for key, name in sets.items()]
    yield _panel("loss", "Loss", "nats per token", loss, trim=True)
    if any(len(x) > 1 for run in runs for x, _ in run.validation_sets().values()):
        curves = [_curve(key, name, "marked") for key, name in sets.items()]
        yield _panel("validation", "Validation loss", "nats per token", curves, smooth=False)
    for panel, metrics in shown_panels(runs):
        yield _panel(
            panel.name,
            panel.title,
            panel.unit,
            [_curve(metric.name, metric.label or panel.title) for metric in metrics],
            log=panel.log_scale,
            zero=panel.from_zero,
            smooth=panel.smoothed,
        )
    if any(run.values(MFU.name)[1] for run in runs):
        yield _panel("mfu", "MFU", "%", [_curve(MFU.name, "MFU")], zero=True)
    for group, title, unit in (
        (DATASET_LOSS, "Loss per dataset", "nats per token"),
        (DATASET_TOKENS, "Consumed tokens per dataset", "tokens"),
    ):
        datasets = _names(runs, group.prefix)
        if datasets:
            is_loss = group is DATASET_LOSS
            curves = [_curve(key, name) for key, name in datasets.items()]
            name = group.prefix.replace(" ", "_")
            yield _panel(name, title, unit, curves, zero=not is_loss, smooth=is_loss, trim=is_loss)


def _panel(
    name: str, title: str, unit: str, curves: list[dict[str, str]], **flags: bool
) -> dict[str, Any]:
    """Return a panel; ``trim``: the first axis limits ignore the initial drop of a loss."""
    defaults = {"log": False, "zero": False, "smooth": True, "trim": False}
    return {"name": name, "title": title, "unit": unit, "curves": curves, **defaults, **flags}


def _curve(key: str, label: str, style: str = "line") -> dict[str, str]:
    return {"key": key, "label": label, "style": style}


def _names(runs: Sequence[MetricsHistory], prefix: str, validation: bool = False) -> dict[str, str]:
    """Return the datasets or validation sets of all runs by the key of their curve."""
    keys: dict[str, str] = {}
    for run in runs:
        for record in run.validation if validation else run.training:
            for key in record:
                if key.startswith(f"{prefix}/"):
                    keys.setdefault(key, key.removeprefix(f"{prefix}/"))
    return keys


def _run(run: MetricsHistory, name: str, keys: set[str]) -> dict[str, Any]:
    marks = find_marks(run)
    curves = {key: points for key in sorted(keys) if (points := _points(run, key))[0]}
    return {
        "name": name,
        "iteration": run.iteration,
        "folds": [asdict(fold) for fold in run.folds()[:MAX_FOLDS]],
        "marks": [[mark.kind, mark.iteration, mark.text[:300]] for mark in limit_marks(marks)],
        "counts": count_marks(marks),
        "tokens": _tokens(run),
        "curves": {key: _rounded(reduce_curve(x, y)) for key, (x, y) in curves.items()},
    }


def _points(run: MetricsHistory, key: str) -> _Points:
    """Return the iterations and values of a curve."""
    if key == REPEATED:
        return _repeated(run)
    for name, points in run.validation_sets().items():
        if key == VALIDATION_LOSS.key(name):
            return points
    scale = 100.0 if key == MFU.name else METRICS[key].scale if key in METRICS else 1.0
    iterations, values = run.values(key)
    return iterations, [value * scale for value in values]


def _repeated(run: MetricsHistory) -> _Points:
    """Return the abandoned intervals by iteration; of several the first one."""
    found: dict[int, float] = {}
    for record in (record for abandoned in run.abandoned for record in abandoned):
        loss = record.get(LM_LOSS.name)
        if isinstance(loss, int | float) and math.isfinite(loss):
            found.setdefault(int(record[ITERATION]), float(loss))
    return sorted(found), [found[iteration] for iteration in sorted(found)]


def _tokens(run: MetricsHistory) -> list[list[float]]:
    """Return iterations and the tokens consumed until then, from 0 on; empty if not logged."""
    known: list[JsonRecord] = [r for r in run.training if r.get(CONSUMED_TOKENS.name)]
    if not known and run.config is not None:
        length = run.config.data.seq_length
        iterations, samples = run.values("consumed samples")
        pairs = [(i, int(s) * length) for i, s in zip(iterations, samples, strict=True)]
    else:
        pairs = [(int(r[ITERATION]), int(r[CONSUMED_TOKENS.name])) for r in known]
    if not pairs:
        return []
    step = max(1, len(pairs) // TOKEN_POINTS)
    chosen = [(0, 0), *pairs[:-1:step], pairs[-1]]
    return [[x for x, _ in chosen], [y for _, y in chosen]]


def _rounded(curve: Curve) -> dict[str, list[float]]:
    """Return a curve as JSON, with six digits per value: a plot does not show more."""
    data = {"x": curve.x, "y": curve.y, "mx": curve.mean_x, "my": curve.mean_y}
    return {
        key: [int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")
              for value in values]
        for key, values in data.items() if values
    }  # fmt: skip
