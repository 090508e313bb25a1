"""Plots of a run's report that show metrics of training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A plot of the report, with the metrics whose :attr:`Metric.panel` it is."""

    name: str
    """Stem of the image file."""
    title: str
    unit: str = ""
    log_scale: bool = False
    from_zero: bool = False
    hide_constant: bool = False
    """Whether to omit the plot if its values never change."""
    smoothed: bool = True
    """Whether the smoothing of the interactive report applies to it."""


LEARNING_RATE_PANEL = Panel("learning_rate", "Learning rate", from_zero=True, smoothed=False)
THROUGHPUT_PANEL = Panel("throughput", "Throughput", "tokens per second", from_zero=True)
GRADIENT_NORM_PANEL = Panel("gradient_norm", "Gradient norm, before clipping", log_scale=True)
PARAMETER_NORM_PANEL = Panel("parameter_norm", "Norm of all parameters")
Z_LOSS_PANEL = Panel("z_loss", "z-loss")
EXPERT_LOSS_PANEL = Panel("expert_losses", "Losses of routers")
EXPERT_LOAD_PANEL = Panel("expert_load", "Tokens of the busiest expert by the mean", from_zero=True)
MEMORY_PANEL = Panel("memory", "Memory of the first rank", "GB", from_zero=True, smoothed=False)
RANK_TIMES_PANEL = Panel("rank_times", "Time per iteration by rank", "seconds", from_zero=True)
BATCH_SIZE_PANEL = Panel(
    "batch_size", "Global batch size", "samples", hide_constant=True, smoothed=False
)
LOSS_SCALE_PANEL = Panel(
    "loss_scale", "Loss scale", log_scale=True, hide_constant=True, smoothed=False
)

FIRST_PANELS = (
    LEARNING_RATE_PANEL,
    THROUGHPUT_PANEL,
    GRADIENT_NORM_PANEL,
    PARAMETER_NORM_PANEL,
    Z_LOSS_PANEL,
    EXPERT_LOSS_PANEL,
    EXPERT_LOAD_PANEL,
    MEMORY_PANEL,
    RANK_TIMES_PANEL,
    BATCH_SIZE_PANEL,
    LOSS_SCALE_PANEL,
)
"""Order of panels in the report; others follow in the order of :data:`METRICS`."""
