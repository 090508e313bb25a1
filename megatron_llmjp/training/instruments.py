"""Measurements around each step of a rank: computing times, profilers and memory snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.utils import configure_nvtx_profiling, get_model_config

from megatron_llmjp.config.schema import Config
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.compute_timer import ComputeTimer, EventClock, HostClock
from megatron_llmjp.training.predicted_step import StepPredictor
from megatron_llmjp.training.profiling import StepProfiler
from megatron_llmjp.training.stragglers import StragglerMonitor, build_straggler_monitor


@dataclass(frozen=True)
class StepInstruments:
    """Instruments of this rank, which end with the training loop."""

    timer: ComputeTimer
    stragglers: StragglerMonitor | None
    """None if it is disabled."""
    profiler: StepProfiler
    predictor: StepPredictor

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Measure the step after ``iteration`` completed ones."""
        self.profiler.before_step(iteration)
        with self.timer.step():
            yield
        self.profiler.after_step(iteration + 1)

    def __enter__(self) -> StepInstruments:
        """Begin the training loop."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the profiler if the loop ends within the profiled iterations."""
        self.profiler.close()


def install_instruments(
    config: Config, chunks: list[Any], device: Device, rank: int, hosts: Sequence[str]
) -> StepInstruments:
    """Build the instruments of a run, and let megatron-core's schedules call those in use.

    Args:
        config: the run's configuration.
        chunks: model chunks of this rank.
        device: the device of this rank.
        rank: rank of this process.
        hosts: host of each rank.
    """
    ranges = config.profiling.nvtx_ranges
    configure_nvtx_profiling(ranges)
    timer = ComputeTimer(EventClock() if device.is_cuda else HostClock(), ranges)
    monitor = build_straggler_monitor(config, timer, device, hosts)
    if monitor is not None or ranges:
        get_model_config(chunks[0]).timers = timer
    profiler = StepProfiler(config, device, rank)
    return StepInstruments(timer, monitor, profiler, StepPredictor(config, device.name, hosts))
