"""Fit of positive parameters to the logarithms of measured times, and leave-one-out errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Run = TypeVar("Run")

LOSS_SCALE = 0.08
"""Logarithmic error at which the loss turns from quadratic to linear, so that runs with unknown
causes of slowness do not set the parameters."""
LEFT_OUT_ITERATIONS = 6
"""From the parameters of all runs."""
DIFFERENCE = 1e-3
"""Logarithmic change of a parameter for the derivative."""
MAX_STEP = 0.5
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Model(Generic[Run]):
    """What is fitted.

    Args:
        errors: returns the logarithm of predicted by measured time of each run, for the logarithms
            of the parameters.
        limits: logarithms of the smallest and of the largest parameters.
    """

    errors: Callable[[Sequence[Run], Vector], Vector]
    limits: Vector

    def fit(self, runs: Sequence[Run], logs: Vector, iterations: int = 40) -> Vector:
        """Fit the logarithms of the parameters by damped Gauss-Newton steps.

        Minimizes the sum of ``sqrt(1 + (error / LOSS_SCALE)^2)`` within the limits.
        """
        errors, damping = self.errors(runs, logs), 1e-2
        for _ in range(iterations):
            shifted = [logs + DIFFERENCE * row for row in np.eye(len(logs))]
            slopes = [(self.errors(runs, x) - errors) / DIFFERENCE for x in shifted]
            step = _step(np.stack(slopes, axis=1), errors, damping)
            tried = np.clip(logs + np.clip(step, -MAX_STEP, MAX_STEP), *self.limits)
            found = self.errors(runs, tried)
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

    def left_out_errors(self, runs: Sequence[Run], logs: Vector, keys: Sequence[str]) -> Vector:
        """Return the error of each run, predicted from a fit to the runs with other keys.

        Args:
            runs: the runs.
            logs: parameters to start from, those of a fit to all runs.
            keys: of each run.
        """
        errors = np.empty(len(runs))
        for key in dict.fromkeys(keys):
            kept = [run for run, other in zip(runs, keys, strict=True) if other != key]
            fitted = self.fit(kept, logs, LEFT_OUT_ITERATIONS)
            for number, other in enumerate(keys):
                if other == key:
                    errors[number] = self.errors([runs[number]], fitted)[0]
        return errors


def _step(slopes: Vector, errors: Vector, damping: float) -> Vector:
    """Return a damped Gauss-Newton step."""
    weights = 1 / np.sqrt(1 + (errors / LOSS_SCALE) ** 2)
    curvature = (slopes * weights[:, None]).T @ slopes
    damped = curvature + damping * np.diag(np.diag(curvature) + TOLERANCE)
    return np.linalg.solve(damped, -(slopes * weights[:, None]).T @ errors)


def _loss(errors: Vector) -> float:
    return float(np.sum(np.sqrt(1 + (errors / LOSS_SCALE) ** 2)))
