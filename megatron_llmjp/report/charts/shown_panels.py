"""Selection of the metric panels that a report shows."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llmjp.metric_panels import Panel
from megatron_llmjp.metric_registry import Metric, panels
from megatron_llmjp.report.history import MetricsHistory


def shown_panels(runs: Sequence[MetricsHistory]) -> list[tuple[Panel, list[Metric]]]:
    """Return the panels with the metrics that a run has logged.

    Metrics that are always 0 are omitted, and panels that are not shown for constant values.
    """
    found = []
    for panel, metrics in panels().items():
        logged = [metric for metric in metrics if any(_is_logged(metric, run) for run in runs)]
        if logged and not (panel.hide_constant and _is_constant(logged, runs)):
            found.append((panel, logged))
    return found


def _is_logged(metric: Metric, run: MetricsHistory) -> bool:
    return any(value != 0.0 for value in run.values(metric.name)[1])


def _is_constant(metrics: Sequence[Metric], runs: Sequence[MetricsHistory]) -> bool:
    return all(
        len({value for run in runs for value in run.values(metric.name)[1]}) <= 1
        for metric in metrics
    )
