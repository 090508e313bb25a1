"""Failures, saves and restarts of a planned run: assumptions, the run's history, text report."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.estimate.failures import (
    PUBLISHED_SOURCE,
    ExpectedTime,
    FailureModel,
    ObservedJobs,
    best_interval,
    expected_time,
    published_time_between_failures,
    time_between_failures,
)
from megatron_llmjp.formatting import format_bytes, format_table

HOUR = 3600.0
DAY = 86400.0
NODE_WRITE_BANDWIDTH = 1e9
"""Bytes per second and node of the file system, unless given: an assumption."""
COPY_BANDWIDTH = 20e9
"""Bytes per second and GPU of copies to page-locked memory: PCIe 4.0 x16 reaches about 25 GB/s."""
PLANNING_SECONDS = 1.0
"""Time in which the ranks agree on the files of a save: an assumption."""


@dataclass(frozen=True)
class FailureForecast:
    """Failures and saves of a planned run, and where the numbers are from."""

    model: FailureModel
    failure_source: str
    save_source: str


def forecast_failures(
    machine: PlannedMachine,
    checkpoint: int,
    rank_bytes: int | None,
    observed: ObservedJobs | None = None,
) -> FailureForecast:
    """Forecast failures and saves of a run.

    Args:
        machine: the machine of the run.
        checkpoint: size of a checkpoint in bytes.
        rank_bytes: bytes that a rank copies in an asynchronous save; None for synchronous saves.
        observed: the run's jobs so far; None for a new run.
    """
    failures, source = _time_between_failures(machine, observed)
    nodes = -(-machine.world_size // machine.gpus_per_node)
    bandwidth = machine.write_bandwidth or nodes * NODE_WRITE_BANDWIDTH
    save_time = PLANNING_SECONDS + checkpoint / bandwidth
    stall = save_time if rank_bytes is None else PLANNING_SECONDS + rank_bytes / COPY_BANDWIDTH
    save_source = f"at {format_bytes(bandwidth)}/s"
    queue = machine.queue_minutes * 60
    if observed is not None:
        if observed.save_time is not None and observed.save_stall is not None:
            save_time, stall, save_source = observed.save_time, observed.save_stall, "in this run"
        queue = observed.queue if observed.queue is not None else queue
    model = FailureModel(
        between_failures=failures,
        save_stall=stall,
        save_time=max(save_time, stall),
        restart=machine.restart_minutes * 60,
        queue=queue,
    )
    return FailureForecast(model, source, save_source)


def _time_between_failures(
    machine: PlannedMachine, observed: ObservedJobs | None
) -> tuple[float, str]:
    """Return the mean time between failures in seconds, and its source."""
    if machine.mtbf_hours is not None:
        return machine.mtbf_hours * HOUR, "--mtbf-hours"
    published = published_time_between_failures(machine.world_size)
    if observed is None:
        return published, f"{PUBLISHED_SOURCE}; scaled to {machine.world_size:,}"
    return time_between_failures(published, observed), (
        f"{observed.failures} in {observed.seconds / HOUR:,.1f} h of this run, and one in "
        f"{published / HOUR:,.1f} h as Llama 3"
    )


def format_failures(
    forecast: FailureForecast, step_seconds: float, training: float | None, saves: int
) -> str:
    """Format the forecast as a table.

    Args:
        forecast: failures and saves.
        step_seconds: duration of a step.
        training: duration of the run without failures and saves, in seconds; None if unknown.
        saves: number of saves of the run.
    """
    model = forecast.model
    best = best_interval(model)
    least = f"{_time(best)} ({max(1, round(best / step_seconds)):,} steps) loses least"
    rows = [
        ("failures", f"one in {_time(model.between_failures)} ({forecast.failure_source})"),
        (
            "a save",
            f"blocks training for {_time(model.save_stall)}, is complete after "
            f"{_time(model.save_time)} ({forecast.save_source})",
        ),
        ("a restart", f"{_time(model.restart)} after {_time(model.queue)} in the queue"),
    ]
    if training is None or training <= 0:
        return format_table([*rows, ("save interval", least)], right=())
    configured = training / max(1, saves)
    expected = expected_time(model, training, configured)
    optimum = expected_time(model, training, min(best, training))
    rows += [
        ("save interval", f"{_time(configured)} as configured; {least}"),
        ("with failures", _days(expected)),
        ("best interval", f"{_day(optimum.total)} days"),
    ]
    return format_table(rows, right=())


def _days(expected: ExpectedTime) -> str:
    """Format the expected duration and what it is spent on."""
    return (
        f"{_day(expected.total)} days, {expected.failures:,.1f} failures: saves "
        f"{_day(expected.saves)}, repeated steps {_day(expected.lost)}, restarts "
        f"{_day(expected.restarts)}, queue {_day(expected.queue)}"
    )


def _day(seconds: float) -> str:
    return f"{seconds / DAY:,.2f}"


def _time(seconds: float) -> str:
    """Format a time with two or three digits: ``38 s``, ``86 min``, ``99 h``, ``21 days``."""
    for size, unit, limit in ((1.0, "s", 100), (60.0, "min", 120), (HOUR, "h", 240)):
        if seconds < limit * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / DAY:,.0f} days"
