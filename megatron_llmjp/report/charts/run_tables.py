"""Tables of a report: events and folds of a run, and the comparison of several runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_llmjp.metric_registry import LM_LOSS
from megatron_llmjp.report.charts.expert_tokens import expert_tables
from megatron_llmjp.report.charts.marks import find_marks
from megatron_llmjp.report.history import MetricsHistory
from megatron_llmjp.report.html_page import html_table
from megatron_llmjp.report.summary import summary_rows

MAX_EVENTS = 100
"""Newest events in the table."""
FALLBACK_ROWS = 20
"""Rows of the table of losses in a page without JavaScript."""
_MISSING = "–"
_UNCOMPARED = ("checkpoint.save", "checkpoint.load", "logging.tensorboard_dir")
"""Fields that differ between any two runs."""


def run_tables(run: MetricsHistory) -> list[str]:
    """Return the tables of the folds, experts and events of a run, as HTML, if there are any."""
    return [*_folds(run), *expert_tables(run.folder), *_events(run)]


def comparison_tables(runs: Sequence[MetricsHistory], names: Sequence[str]) -> list[str]:
    """Return the summaries of several runs as one table, and how their configurations differ."""
    rows = [[label, *values] for label, values in comparison_rows(runs)]
    parts = ["<h2>Runs</h2>", html_table(["", *names], rows, "texts")]
    configs = [_flat(run.config.model_dump(mode="json")) if run.config else {} for run in runs]
    fields = dict.fromkeys(name for config in configs for name in config)
    differing = [
        name
        for name in fields
        if name not in _UNCOMPARED and len({repr(config.get(name)) for config in configs}) > 1
    ]
    if all(configs) and differing:
        rows = [[name, *(str(config.get(name)) for config in configs)] for name in differing]
        parts += ["<h2>Differences of the configuration</h2>"]
        parts.append(html_table(["", *names], rows, "texts"))
    elif not all(configs):
        without = ", ".join(name for name, config in zip(names, configs, strict=True) if not config)
        parts.append(html_table(["configuration"], [[f"no checkpoint yet: {without}"]], "texts"))
    return parts


def comparison_rows(runs: Sequence[MetricsHistory]) -> list[tuple[str, list[str]]]:
    """Return the labels of the summaries of several runs, and the value of each run."""
    summaries = [dict(summary_rows(run)) for run in runs]
    labels = dict.fromkeys(label for rows in summaries for label in rows)
    return [(label, [rows.get(label, _MISSING) for rows in summaries]) for label in labels]


def loss_table(runs: Sequence[MetricsHistory], names: Sequence[str]) -> str:
    """Return a table of the training losses by iteration, for a page without JavaScript."""
    curves = [dict(zip(*run.values(LM_LOSS.name), strict=True)) for run in runs]
    iterations = sorted({iteration for curve in curves for iteration in curve})
    step = max(1, -(-len(iterations) // FALLBACK_ROWS))
    chosen = sorted({*iterations[::step], *iterations[-1:]})
    rows = [
        [f"{i:,}", *(f"{curve[i]:.4f}" if i in curve else _MISSING for curve in curves)]
        for i in chosen
    ]
    return html_table(["training loss at iteration", *names], rows)


def _folds(run: MetricsHistory) -> Iterator[str]:
    folds = run.folds()
    if len(folds) < 2:
        return
    losses = list(zip(*run.values(LM_LOSS.name), strict=True))
    rows = []
    for fold in folds:
        within = [loss for iteration, loss in losses if fold.first < iteration <= fold.last]
        ends = [f"{loss:.4f}" for loss in (within[0], within[-1])] if within else [_MISSING] * 2
        rows.append([fold.name, f"{fold.first + 1:,}", f"{fold.last:,}", *ends])
    heads = ["fold", "first iteration", "last iteration", "first loss", "last loss"]
    yield _details(f"Folds ({len(folds):,})", html_table(heads, rows))


def _events(run: MetricsHistory) -> Iterator[str]:
    marks = [mark for mark in find_marks(run) if mark.kind != "checkpoint"]
    if not marks:
        return
    newest = sorted(marks, key=lambda mark: -mark.iteration)[:MAX_EVENTS]
    rows = [[f"{mark.iteration:,}", mark.kind, mark.text] for mark in newest]
    shown = f", the newest {len(newest):,}" if len(newest) < len(marks) else ""
    yield _details(
        f"Events ({len(marks):,}{shown})",
        html_table(["iteration", "event", "reason"], rows, "texts"),
    )


def _details(heading: str, content: str) -> str:
    return f"<details><summary>{heading}</summary>\n{content}\n</details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their path, such as ``optimizer.lr``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
