"""Plot of a run's scaling: days and MFU against the number of GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.search.scaling import SECONDS_PER_DAY, Scaling, ScalingPoint


def plot_scaling(scaling: Scaling, path: Path) -> None:
    """Draw strong and weak scaling; the range of days is that of the published runs.

    Raises:
        UserError: the file cannot be written, or its suffix is no picture format.
    """
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    days, mfu = figure.subplots(1, 2)
    for label, points in (("same batch", scaling.strong), ("batch per GPU", scaling.weak)):
        _draw(days, mfu, label, [point for point in points if point.best])
    days.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="days")
    mfu.set(xscale="log", xlabel="GPUs", ylabel="MFU", ylim=(0.0, None))
    gpus = [point.gpus for point in scaling.strong]
    for axes in (days, mfu):
        axes.set_xticks(gpus, [str(number) for number in gpus])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    mfu.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--scaling-plot {path}: {error}") from error


def _draw(days: Any, mfu: Any, label: str, points: list[ScalingPoint]) -> None:
    gpus = [point.gpus for point in points]
    middle = [(point.seconds or 0.0) / SECONDS_PER_DAY for point in points]
    days.plot(gpus, middle, marker="o", label=label)
    ranges = [point.best.estimate.error_range for point in points if point.best]
    low = [factors[0] * value for factors, value in zip(ranges, middle, strict=True)]
    high = [factors[1] * value for factors, value in zip(ranges, middle, strict=True)]
    days.fill_between(gpus, low, high, alpha=0.2)
    shares = [point.best.estimate.mfu for point in points if point.best]
    mfu.plot(gpus, shares, marker="o", label=label)
