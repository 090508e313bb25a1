"""Step times that a run measured, for the estimate of other runs and for its own report."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import median

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.flops import flops_per_sample
from megatron_llmjp.estimate.speed.gpus import find_gpu
from megatron_llmjp.estimate.speed.measured_runs import (
    MeasuredRun,
    compared_times,
    format_difference,
)
from megatron_llmjp.metric_registry import (
    EVENT,
    GLOBAL_BATCH_SIZE,
    HARDWARE,
    ITERATION,
    LONGEST_COMPUTING_SECONDS,
    METRICS_FILE,
    PREDICTED_COMPUTING_SECONDS,
    PREDICTED_SECONDS,
    SECONDS_PER_ITERATION,
    TFLOPS_PER_GPU,
    TOKENS_PER_SECOND,
)
from megatron_llmjp.report.history import JsonRecord, MetricsHistory, read_history

MIN_ITERATIONS = 10
"""Smallest number of steps that a measured time is the median of."""


def read_measured_run(folder: Path, gpu: str) -> MeasuredRun:
    """Read the step time of a run, with its last batch size and number of GPUs.

    The first log interval of each process is omitted: it contains the start of kernels and
    connections.

    Args:
        folder: its save folder.
        gpu: type of the GPUs that it must have run on.

    Raises:
        UserError: the folder has no metrics, no checkpoint or too few steps, or the run was on
            other devices.
    """
    history = read_history(folder)
    if history.config is None:
        raise UserError(
            f"{folder} has no checkpoint, whose configuration is needed; expected a run of "
            f"{MIN_ITERATIONS} steps or more that has saved"
        )
    hardware = last_hardware(history)
    if hardware is not None and find_gpu(hardware) != find_gpu(gpu):
        raise UserError(f"the run in {folder} was on {hardware}, not on --gpu {gpu}")
    records = _steady_records(history, history.config)
    iterations = sum(steps for _, steps in records)
    if iterations < MIN_ITERATIONS:
        raise UserError(
            f"{folder}/{METRICS_FILE} has {iterations} steps after the first log interval of each "
            f"start; expected {MIN_ITERATIONS} or more of one batch size and number of GPUs"
        )
    last = records[-1][0]
    timed = (record.get(LONGEST_COMPUTING_SECONDS.name) for record, _ in records)
    computing = [float(seconds) for seconds in timed if seconds]
    batch = int(last[GLOBAL_BATCH_SIZE.name])
    world_size = world_size_of(history.config, last)
    assert world_size is not None
    return MeasuredRun(
        str(folder),
        replace_fields(history.config, global_batch_size=batch, rampup_batch_size=None),
        world_size,
        iterations,
        median(float(r[SECONDS_PER_ITERATION.name]) for r, _ in records),
        median(computing) if computing else None,
    )


def last_hardware(history: MetricsHistory) -> str | None:
    """Return the devices of the newest process of a run; None if an earlier version wrote it."""
    starts = [event for event in history.events if event[EVENT] == "start"]
    found = starts[-1].get(HARDWARE) if starts else None
    return found if isinstance(found, str) else None


def world_size_of(config: Config, record: JsonRecord) -> int | None:
    """Return the number of processes: total throughput divided by throughput per GPU."""
    speed, each = record.get(TOKENS_PER_SECOND.name), record.get(TFLOPS_PER_GPU.name)
    if not speed or not each:
        return None
    return round(flops_per_sample(config) / config.data.seq_length * speed / each / 1e12)


def compared_step_rows(record: JsonRecord) -> list[tuple[str, str]]:
    """Return labels and text of the measured and predicted times of a log interval."""
    seconds, predicted = record.get(SECONDS_PER_ITERATION.name), record.get(PREDICTED_SECONDS.name)
    if not seconds or not predicted:
        return []
    times = compared_times(
        seconds,
        record.get(LONGEST_COMPUTING_SECONDS.name),
        predicted,
        record.get(PREDICTED_COMPUTING_SECONDS.name) or 0.0,
    )
    return [
        (name, f"{found:.3f} s, predicted {expected:.3f} s ({format_difference(found, expected)})")
        for name, found, expected in times
    ]


def _steady_records(history: MetricsHistory, config: Config) -> list[tuple[JsonRecord, int]]:
    """Return the log intervals like the last one, and their numbers of steps."""
    starts = [int(event[ITERATION]) for event in history.events if event[EVENT] == "start"]
    found: list[tuple[JsonRecord, int]] = []
    for before, record in pairwise(history.training):
        first, last = int(before[ITERATION]), int(record[ITERATION])
        # The interval after a start begins where the process resumed, or before.
        if not any(first <= start < last for start in starts) and _is_complete(record, config):
            found.append((record, last - first))
    return [(r, steps) for r, steps in found if _kind(r, config) == _kind(found[-1][0], config)]


def _is_complete(record: JsonRecord, config: Config) -> bool:
    return bool(record.get(SECONDS_PER_ITERATION.name) and all(_kind(record, config)))


def _kind(record: JsonRecord, config: Config) -> tuple[object, ...]:
    """Return what the step time depends on, of what may change within a run."""
    return record.get(GLOBAL_BATCH_SIZE.name), world_size_of(config, record)
