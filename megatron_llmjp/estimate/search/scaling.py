"""Scaling of a run: the fastest layout on each number of GPUs, its cost, and what limits it.

Strong scaling keeps the global batch size, weak scaling keeps it per GPU. Days are those of the
tokens of the run, so that weak scaling takes fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.estimate_numbers import candidate_numbers
from megatron_llmjp.estimate.expert_report import UNMEASURED
from megatron_llmjp.estimate.layout_report import format_layout
from megatron_llmjp.estimate.run_estimate import run_length_without_data
from megatron_llmjp.estimate.search.layout_search import (
    LayoutCandidate,
    has_divisible_layout,
    search_layouts,
)
from megatron_llmjp.estimate.search.scaling_limits import growth, largest_overhead
from megatron_llmjp.estimate.speed.fitted_step_time import ACCURACY
from megatron_llmjp.estimate.speed.measured_runs import ComparedRun
from megatron_llmjp.formatting import format_count, format_table

SECONDS_PER_DAY = 86400.0
DEFAULT_TOKENS = 10**12
"""Tokens of a run of unknown length."""
MULTIPLES = (0.25, 0.5, 1, 2, 4)
"""Numbers of GPUs that suggestions compare, as multiples of the planned one."""


@dataclass(frozen=True)
class ScalingPoint:
    """Fastest layout on a number of GPUs."""

    gpus: int
    global_batch_size: int
    best: LayoutCandidate | None
    """None if no layout is possible."""
    seconds: float | None
    """Of the run, without saves and failures."""
    limit: str
    """What costs GPU time, compared with the fewest GPUs, or why no layout is possible."""


@dataclass(frozen=True)
class Scaling:
    """Strong and weak scaling over the same numbers of GPUs."""

    tokens: int
    """Of the run."""
    is_assumed: bool
    """Whether the length of the run is unknown, and ``tokens`` an assumption."""
    strong: tuple[ScalingPoint, ...]
    weak: tuple[ScalingPoint, ...]
    """From the same batch size on the smallest number of GPUs; empty for a single number."""


def scale_run(
    config: Config,
    machine: PlannedMachine,
    measured_runs: Sequence[ComparedRun] = (),
    weak: bool = True,
) -> Scaling:
    """Search the fastest layout on each of :attr:`PlannedMachine.scaling` GPUs.

    Args:
        config: the run's configuration.
        machine: its GPUs.
        measured_runs: runs on the same machine that correct the predicted step times.
        weak: whether to compute weak scaling too.
    """
    length = run_length_without_data(config)
    tokens = length.samples * config.data.seq_length if length else DEFAULT_TOKENS
    batch, first = config.training.global_batch_size, machine.scaling[0]

    def point(gpus: int, batch: int) -> ScalingPoint:
        return _point(config, machine.with_world_size(gpus), batch, tokens, measured_runs)

    strong = tuple(point(gpus, batch) for gpus in machine.scaling)
    others = machine.scaling[1:] if weak else ()
    grown = tuple(point(gpus, batch * gpus // first) for gpus in others)
    weak_points = _with_growth(strong[:1] + grown) if grown else ()
    return Scaling(tokens, length is None, _with_growth(strong), weak_points)


def _point(
    config: Config,
    machine: PlannedMachine,
    batch: int,
    tokens: int,
    measured_runs: Sequence[ComparedRun],
) -> ScalingPoint:
    config = replace_fields(config, global_batch_size=batch, rampup_batch_size=None)
    gpus = machine.world_size
    found = search_layouts(config, machine, measured_runs)
    found = found or search_layouts(config, machine, measured_runs, beyond_node=True)
    if not found:
        reason = (
            "no layout fits into memory"
            if has_divisible_layout(config, machine)
            else f"global batch size {batch} is not divisible by the replicas of any layout"
        )
        return ScalingPoint(gpus, batch, None, None, reason)
    best = found[0]
    seconds = tokens / (batch * config.data.seq_length) * best.seconds
    return ScalingPoint(gpus, batch, best, seconds, largest_overhead(best.estimate))


def _with_growth(points: Sequence[ScalingPoint]) -> tuple[ScalingPoint, ...]:
    """Compare the points with that of the fewest GPUs."""
    first = next((point.best for point in points if point.best), None)
    return tuple(
        replace(point, limit=growth(point.best.estimate, first.estimate))
        if point.best and first and point.best is not first
        else point
        for point in points
    )


def format_scaling(scaling: Scaling, machine: PlannedMachine) -> str:
    """Format tables of strong and weak scaling."""
    length = f"{format_count(scaling.tokens)} tokens"
    if scaling.is_assumed:
        length += " (assumed: the length of the run is unknown)"
    batch = scaling.strong[0].global_batch_size
    parts = [
        f"{length} on {machine.gpu}; the fastest layout on each number of GPUs\n"
        f"strong scaling: global batch size {batch}",
        _table(scaling.strong, scaling.tokens, machine),
    ]
    if scaling.weak:
        parts += [
            f"weak scaling: global batch size {batch} on {scaling.weak[0].gpus} GPUs",
            _table(scaling.weak, scaling.tokens, machine),
        ]
    return "\n".join([*parts, _rests_on(scaling.strong)])


def fastest_of_fewer(points: Sequence[ScalingPoint]) -> tuple[ScalingPoint, ...]:
    """Return the points that are faster than all points with fewer GPUs: the Pareto front."""
    found: list[ScalingPoint] = []
    for point in sorted(points, key=lambda point: point.gpus):
        seconds = point.seconds
        if seconds is not None and all(seconds < (p.seconds or 0.0) for p in found):
            found.append(point)
    return tuple(found)


def format_pareto(scaling: Scaling, machine: PlannedMachine) -> str:
    """Format days against GPUs, without numbers of GPUs that are slower than fewer."""
    points = fastest_of_fewer(scaling.strong)
    assumed = " (assumed)" if scaling.is_assumed else ""
    head = f"days for {format_count(scaling.tokens)} tokens{assumed} by number of GPUs, same batch"
    return "\n".join([head, _table(points, scaling.tokens, machine), _rests_on(points)])


def _rests_on(points: Sequence[ScalingPoint]) -> str:
    accuracy = next((p.best.estimate.accuracy for p in points if p.best), ACCURACY)
    if accuracy is None:
        return f"days without failures; {UNMEASURED}"
    return f"days in parentheses: 80% of {accuracy.runs} published runs, without failures"


def _table(points: tuple[ScalingPoint, ...], tokens: int, machine: PlannedMachine) -> str:
    columns = ["GPUs", "layout", "step", "MFU", "tokens/s", "days"]
    columns += ["cost"] if machine.gpu_hour_price else []
    columns += ["MWh"] if machine.gpu_power else []
    rows = [(*columns, "limit")]
    fastest = float("inf")
    for point in points:
        if point.best is None or point.seconds is None:
            rows.append((str(point.gpus), *[""] * (len(columns) - 1), point.limit))
            continue
        limit = point.limit
        if point.seconds >= fastest:
            limit += "; not faster than fewer GPUs"
        fastest = min(fastest, point.seconds)
        low, high = (
            point.seconds * factor / SECONDS_PER_DAY for factor in point.best.estimate.error_range
        )
        days = point.seconds / SECONDS_PER_DAY
        spread = f" ({low:,.1f} to {high:,.1f})" if low < high else ""
        rows.append(
            (
                str(point.gpus),
                format_layout(point.best.estimate.layout),
                f"{point.best.seconds:.2f}",
                f"{point.best.estimate.mfu:.0%}",
                format_count(tokens / point.seconds),
                f"{days:,.1f}{spread}",
                *(f"{number:,.0f}" for number in _costs(point, machine).values()),
                limit,
            )
        )
    return format_table(rows, right=(0, *range(2, len(columns))))


def _costs(point: ScalingPoint, machine: PlannedMachine) -> dict[str, float]:
    """Return the cost and the energy in MWh, as far as price and power are given."""
    hours = point.gpus * (point.seconds or 0.0) / 3600
    costs = {}
    if machine.gpu_hour_price:
        costs["cost"] = hours * machine.gpu_hour_price
    if machine.gpu_power:
        costs["megawatt_hours"] = hours * machine.gpu_power / 1e6
    return costs


def scaling_numbers(scaling: Scaling, machine: PlannedMachine, given: Config) -> dict[str, Any]:
    """Return all numbers as plain data, for JSON, with the flags that change the given layout."""
    tables = {"strong": scaling.strong, "weak": scaling.weak}
    return {"tokens": scaling.tokens} | {
        kind: [
            {
                "gpus": point.gpus,
                "global_batch_size": point.global_batch_size,
                "run_seconds": point.seconds,
                "limit": point.limit,
                **(_costs(point, machine) if point.best else {}),
                "best": candidate_numbers(point.best, given) if point.best else None,
            }
            for point in points
        ]
        for kind, points in tables.items()
    }
