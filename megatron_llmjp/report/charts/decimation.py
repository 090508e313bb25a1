"""Reduction of long curves to a number of points that a page can hold and a browser can draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

POINTS_PER_GROUP = 4
"""First, smallest, largest and last point of a group."""
MAX_POINTS = 2000
"""Points of a curve in a page; longer curves are reduced."""


@dataclass(frozen=True)
class Curve:
    """Points of a curve, by ascending x."""

    x: list[float]
    y: list[float]
    mean_x: list[float]
    """Centers of the groups of a reduced curve; empty if the curve is complete."""
    mean_y: list[float]
    """Means of the groups."""


def reduce_curve(x: Sequence[float], y: Sequence[float], most: int = MAX_POINTS) -> Curve:
    """Reduce a curve to at most ``most`` of its points, keeping every spike.

    The points are divided into groups of equal size. Of each group the first, smallest, largest and
    last point are kept (the M4 aggregation: a line through them covers the same pixels as the
    complete line), and the means, which a smoothed line is computed from: smoothing the extremes
    would give outliers too much weight.
    """
    if len(x) <= most:
        return Curve(list(x), list(y), [], [])
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    groups = max(1, most // POINTS_PER_GROUP)
    bounds = np.linspace(0, len(xs), groups + 1).astype(int)
    kept: list[int] = []
    for first, end in pairwise(bounds.tolist()):
        group = ys[first:end]
        kept += sorted({first, first + int(group.argmin()), first + int(group.argmax()), end - 1})
    counts = np.diff(bounds)
    means = (np.add.reduceat(values, bounds[:-1]) / counts for values in (xs, ys))
    mean_x, mean_y = (values.tolist() for values in means)
    return Curve(xs[kept].tolist(), ys[kept].tolist(), mean_x, mean_y)
