"""Fit the step-time model to published runs, and print its leave-one-out errors.

``python -m benchmarks.step_time.fit`` prints; ``--write`` also writes the parameters and errors to
``megatron_llmjp/estimate/speed/fitted_step_time.py``. Each error is that of a run predicted from a
fit to all other runs, and in the second column to all other groups of runs (papers and programs).
The errors of corrected runs are those of the second column after multiplying by measured and
predicted time of another run of the group, as ``estimate/speed/measured_runs.py`` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import astuple, fields
from math import lcm
from pathlib import Path

import numpy as np

from benchmarks.step_time.least_squares import Model, Vector
from benchmarks.step_time.published_runs import PublishedRun, load_runs
from megatron_llmjp.estimate.speed.fitted_step_time import FITTED
from megatron_llmjp.estimate.speed.step_parameters import ModelAccuracy, StepParameters
from megatron_llmjp.estimate.speed.step_time import StepTime, step_time

LIMITS = np.log([[0.3, 0.3, 20.0, 0.2, 0.2, 1e-3, 1e-6], [1.0, 1.0, 900.0, 1.0, 1.0, 0.3, 1e-3]])
"""Physical limits of the parameters: efficiencies are at most 1."""
WRITTEN = Path(__file__).parents[2] / "megatron_llmjp/estimate/speed/fitted_step_time.py"
SHOWN_TERMS = 4


def log_errors(runs: Sequence[PublishedRun], logs: Vector) -> Vector:
    """Return the logarithm of predicted by published seconds of each run."""
    parameters = StepParameters(*np.exp(logs))
    return np.array([np.log(step_time(r.load, r.gpu, parameters).total / r.seconds) for r in runs])


PUBLISHED_RUNS = Model(log_errors, LIMITS)


def corrected_errors(errors: Vector, keys: Sequence[str]) -> Vector:
    """Return the errors of each run after correction by another run with the same key.

    Args:
        errors: of each run, predicted from runs with other keys.
        keys: of each run.

    Returns:
        The same number of errors for each run, so that all have the same weight: one for each
        other run of its key, repeated.
    """
    others = [
        [n for n, other in enumerate(keys) if other == key and n != number]
        for number, key in enumerate(keys)
    ]
    most = lcm(*{len(runs) for runs in others if runs})
    found = [
        np.repeat(errors[number] - errors[runs], most // len(runs))
        for number, runs in enumerate(others)
        if runs
    ]
    return np.concatenate(found)


def accuracy(errors: Vector, runs: int | None = None) -> ModelAccuracy:
    """Summarize logarithmic errors, of as many runs unless their number is given."""
    absolute = np.abs(np.expm1(errors))
    low, high = np.exp(-np.quantile(errors, [0.9, 0.1]))
    return ModelAccuracy(
        runs=runs or len(errors),
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


def _written(parameters: StepParameters, found: ModelAccuracy, corrected: ModelAccuracy) -> str:
    lines = [
        '"""Fitted parameters and their errors: ``python -m benchmarks.step_time.fit --write``."""',
        "",
        "from __future__ import annotations",
        "",
        "from megatron_llmjp.estimate.speed.step_parameters import ModelAccuracy, StepParameters",
        "",
    ]
    written: dict[str, StepParameters | ModelAccuracy] = {
        "FITTED": parameters,
        "ACCURACY": found,
        "CORRECTED_ACCURACY": corrected,
    }
    for name, value in written.items():
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
    logs = PUBLISHED_RUNS.fit(fitted, np.log(astuple(FITTED)))
    parameters = StepParameters(*(float(f"{x:.4g}") for x in np.exp(logs)))
    print("fitted; leaving out one run and one group at a time", flush=True)
    groups = [run.group for run in fitted]
    numbers = [str(number) for number in range(len(fitted))]
    by_run = PUBLISHED_RUNS.left_out_errors(fitted, logs, numbers)
    by_group = PUBLISHED_RUNS.left_out_errors(fitted, logs, groups)
    print("run, published and predicted seconds per step, errors without the run and its group")
    _print_runs(fitted, parameters, (by_run, by_group))
    others = [run for run in runs if not run.fitted]
    print("not fitted:")
    _print_runs(others, parameters, (log_errors(others, logs),))
    for field in fields(parameters):
        print(f"{field.name:16} {getattr(parameters, field.name):.4g}")
    found = accuracy(by_run)
    corrected = accuracy(
        corrected_errors(by_group, groups), sum(groups.count(group) > 1 for group in groups)
    )
    results = {
        "without the run": found,
        "without its group": accuracy(by_group),
        "without its group, corrected by another run of it": corrected,
    }
    for name, result in results.items():
        print(
            f"{name}: {result.runs} runs, median error {result.median:.1%}, 90th percentile "
            f"{result.percentile_90:.1%}, published by predicted time {result.low} to {result.high}"
        )
    if write:
        WRITTEN.write_text(_written(parameters, found, corrected), encoding="utf-8")


if __name__ == "__main__":
    main()
