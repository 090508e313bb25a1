"""Fit the step-time model to published runs, and print its leave-one-out errors.

``python -m benchmarks.step_time.fit`` prints; ``--write`` also writes the parameters and errors to
``megatron_llmjp/estimate/fitted_step_time.py``. Each error is that of a run predicted from a fit to
all other runs, and in the second column to all other groups of runs (other papers and programs).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.step_time.published_runs import PublishedRun, load_runs
from megatron_llmjp.estimate.fitted_step_time import FITTED
from megatron_llmjp.estimate.step_parameters import ModelAccuracy, StepParameters
from megatron_llmjp.estimate.step_time import StepTime, step_time

Vector = NDArray[np.float64]

LOSS_SCALE = 0.08
"""Logarithmic error at which the loss turns from quadratic to linear, so that runs with unknown
causes of slowness do not set the parameters."""
LIMITS = np.log([[0.3, 0.3, 20.0, 0.2, 0.2, 1e-3, 1e-6], [1.0, 1.0, 900.0, 1.0, 1.0, 0.3, 1e-3]])
"""Physical limits of the parameters: efficiencies are at most 1."""
LEFT_OUT_ITERATIONS = 6
"""From the parameters of all runs."""
DIFFERENCE = 1e-3
"""Logarithmic change of a parameter for the derivative."""
MAX_STEP = 0.5
TOLERANCE = 1e-6
WRITTEN = Path(__file__).parents[2] / "megatron_llmjp/estimate/fitted_step_time.py"
SHOWN_TERMS = 4


def log_errors(runs: Sequence[PublishedRun], logs: Vector) -> Vector:
    """Return the logarithm of predicted by published seconds of each run."""
    parameters = StepParameters(*np.exp(logs))
    return np.array([np.log(step_time(r.load, r.gpu, parameters).total / r.seconds) for r in runs])


def fit(runs: Sequence[PublishedRun], logs: Vector, iterations: int = 40) -> Vector:
    """Fit the logarithms of the parameters by damped Gauss-Newton steps.

    Minimizes the sum of ``sqrt(1 + (error / LOSS_SCALE)^2)`` within :data:`LIMITS`.
    """
    errors, damping = log_errors(runs, logs), 1e-2
    for _ in range(iterations):
        shifted = [logs + DIFFERENCE * row for row in np.eye(len(logs))]
        slopes = np.stack([(log_errors(runs, x) - errors) / DIFFERENCE for x in shifted], axis=1)
        weights = 1 / np.sqrt(1 + (errors / LOSS_SCALE) ** 2)
        curvature = (slopes * weights[:, None]).T @ slopes
        damped = curvature + damping * np.diag(np.diag(curvature) + TOLERANCE)
        step = np.linalg.solve(damped, -(slopes * weights[:, None]).T @ errors)
        tried = np.clip(logs + np.clip(step, -MAX_STEP, MAX_STEP), *LIMITS)
        found = log_errors(runs, tried)
        gain = _loss(errors) - _loss(found)
        if gain <= 0:
            damping *= 10
            if damping > 1e4:
                break
            continue
        logs, errors, damping = tried, found, damping / 3
        if gain < TOLERANCE:
            break
    return logs


def _loss(errors: Vector) -> float:
    return float(np.sum(np.sqrt(1 + (errors / LOSS_SCALE) ** 2)))


def left_out_errors(runs: Sequence[PublishedRun], logs: Vector, keys: Sequence[str]) -> Vector:
    """Return the error of each run, predicted from a fit to the runs with other keys.

    Args:
        runs: the runs.
        logs: parameters to start from, those of a fit to all runs.
        keys: of each run.
    """
    errors = np.empty(len(runs))
    for key in dict.fromkeys(keys):
        kept = [run for run, other in zip(runs, keys, strict=True) if other != key]
        fitted = fit(kept, logs, LEFT_OUT_ITERATIONS)
        for number, other in enumerate(keys):
            if other == key:
                errors[number] = log_errors([runs[number]], fitted)[0]
    return errors


def accuracy(errors: Vector) -> ModelAccuracy:
    """Summarize logarithmic errors."""
    absolute = np.abs(np.expm1(errors))
    low, high = np.exp(-np.quantile(errors, [0.9, 0.1]))
    return ModelAccuracy(
        runs=len(errors),
        median=round(float(np.median(absolute)), 3),
        percentile_90=round(float(np.quantile(absolute, 0.9)), 3),
        low=round(float(low), 3),
        high=round(float(high), 3),
    )


def _terms(time: StepTime) -> str:
    shown = time.sorted_terms()[:SHOWN_TERMS]
    return ", ".join(f"{name} {seconds / time.total:.0%}" for name, seconds in shown)


def _print_runs(
    runs: Sequence[PublishedRun], parameters: StepParameters, columns: Sequence[Vector]
) -> None:
    for number, run in enumerate(runs):
        time = step_time(run.load, run.gpu, parameters)
        errors = " ".join(f"{np.expm1(column[number]):+7.1%}" for column in columns)
        print(
            f"{run.group:24} {run.name:36} {run.seconds:8.2f} {time.total:8.2f} {errors}  "
            f"{_terms(time)}"
        )


def _written(parameters: StepParameters, found: ModelAccuracy) -> str:
    lines = [
        '"""Fitted parameters and their errors: ``python -m benchmarks.step_time.fit --write``."""',
        "",
        "from __future__ import annotations",
        "",
        "from megatron_llmjp.estimate.step_parameters import ModelAccuracy, StepParameters",
        "",
    ]
    for name, value in (("FITTED", parameters), ("ACCURACY", found)):
        lines.append(f"{name} = {type(value).__name__}(")
        lines += [f"    {f.name}={getattr(value, f.name)!r}," for f in fields(value)]
        lines.append(")")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fit, print, and write if requested."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write fitted_step_time.py")
    write = parser.parse_args().write
    runs = load_runs()
    fitted = [run for run in runs if run.fitted]
    logs = fit(fitted, np.log(astuple(FITTED)))
    parameters = StepParameters(*(float(f"{x:.4g}") for x in np.exp(logs)))
    print("fitted; leaving out one run and one group at a time", flush=True)
    by_run = left_out_errors(fitted, logs, [str(number) for number in range(len(fitted))])
    by_group = left_out_errors(fitted, logs, [run.group for run in fitted])
    print("run, published and predicted seconds per step, errors without the run and its group")
    _print_runs(fitted, parameters, (by_run, by_group))
    others = [run for run in runs if not run.fitted]
    print("not fitted:")
    _print_runs(others, parameters, (log_errors(others, logs),))
    for field in fields(parameters):
        print(f"{field.name:16} {getattr(parameters, field.name):.4g}")
    found = accuracy(by_run)
    for name, result in (("without the run", found), ("without its group", accuracy(by_group))):
        print(
            f"{name}: {result.runs} runs, median error {result.median:.1%}, 90th percentile "
            f"{result.percentile_90:.1%}"
        )
    if write:
        WRITTEN.write_text(_written(parameters, found), encoding="utf-8")


if __name__ == "__main__":
    main()
