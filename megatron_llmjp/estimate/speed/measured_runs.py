"""Measured step times of runs: compared with their prediction, and correcting that of other runs.

A machine may be slower or faster than those of the published runs: its network, clocks and versions
of libraries differ. Its runs share most of the difference, so that the ratio of measured to
predicted time of one run corrects the prediction of another. ``benchmarks/step_time/fit.py`` has
the errors of published runs that another run of the same group corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.speed.step_time import StepTime, run_load, step_time
from megatron_llmjp.estimate.speed.step_work import Software
from megatron_llmjp.estimate.speed.target_gpu import resolve_gpu
from megatron_llmjp.formatting import format_table


@dataclass(frozen=True)
class MeasuredRun:
    """Step time of a run, measured by its training loop."""

    folder: str
    config: Config
    world_size: int
    iterations: int
    """Number of steps that were measured."""
    seconds: float
    """Per step."""
    computing: float | None
    """Seconds per step in forward and backward passes of the rank that computes longest; None if
    it was not measured."""


@dataclass(frozen=True)
class ComparedRun:
    """A measured run and its prediction."""

    measured: MeasuredRun
    predicted: StepTime

    @property
    def factor(self) -> float:
        """Measured by predicted seconds per step."""
        return self.measured.seconds / self.predicted.total


def predict_step(config: Config, machine: PlannedMachine) -> StepTime:
    """Predict the step time of a run.

    Raises:
        UserError: the layout is impossible, or the GPU is unknown.
    """
    layout = make_layout(config, machine.world_size)
    return step_time(run_load(config, layout, Software()), resolve_gpu(config, machine))


def compare_run(measured: MeasuredRun, machine: PlannedMachine, planned: Config) -> ComparedRun:
    """Compare a run with its prediction for the GPUs of another one.

    Args:
        measured: the run.
        machine: GPUs of the planned run; their number is that of the measured one.
        planned: configuration of the planned run, which may set the peak of the GPUs.

    Raises:
        UserError: the GPU is unknown.
    """
    peak = planned.logging.gpu_peak_tflops
    config = replace_fields(measured.config, gpu_peak_tflops=peak) if peak else measured.config
    predicted = predict_step(config, machine.with_world_size(measured.world_size))
    return ComparedRun(measured, predicted)


def correction(runs: Sequence[ComparedRun]) -> float:
    """Return the factor of predicted step times: the geometric mean over runs; 1 without any."""
    return exp(fmean(log(run.factor) for run in runs)) if runs else 1.0


def compared_times(
    seconds: float, computing: float | None, predicted: float, predicted_computing: float
) -> list[tuple[str, float, float]]:
    """Return description, measured and predicted seconds of a step and of what is timed in it."""
    rows = [("step", seconds, predicted)]
    if computing is not None:
        others = seconds - computing, predicted - predicted_computing
        rows.append(("computing on the slowest stage", computing, predicted_computing))
        rows.append(("communication, waits and optimizer", *others))
    return rows


def format_compared(run: ComparedRun) -> str:
    """Format the measured and predicted times of a run."""
    measured, predicted = run.measured, run.predicted
    times = compared_times(
        measured.seconds, measured.computing, predicted.total, predicted.computing
    )
    rows = [("seconds per iteration", "measured", "predicted", "difference")]
    rows += [
        (f"  {name}", f"{found:,.3f}", f"{expected:,.3f}", format_difference(found, expected))
        for name, found, expected in times
    ]
    head = f"{measured.folder}: {measured.world_size} GPUs, {measured.iterations:,} iterations"
    return f"{head}\n{format_table(rows, right=(1, 2, 3))}"


def format_difference(measured: float, predicted: float) -> str:
    """Format by how much a measured time exceeds its prediction; empty without a prediction."""
    return f"{measured / predicted - 1:+.0%}" if predicted > 0 else ""
