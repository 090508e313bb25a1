"""Estimate of a run: memory, communication, step time and duration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule, last_iteration
from megatron_llmjp.data.lr_schedule import length_in_iterations
from megatron_llmjp.estimate.checkpoints import checkpoint_bytes, largest_save
from megatron_llmjp.estimate.communication import CommunicationVolume
from megatron_llmjp.estimate.failure_report import FailureForecast, forecast_failures
from megatron_llmjp.estimate.failures import ObservedJobs
from megatron_llmjp.estimate.flops import step_flops
from megatron_llmjp.estimate.layout import ParallelLayout, make_layout
from megatron_llmjp.estimate.memory import RankMemory, rank_memory
from megatron_llmjp.estimate.speed.fitted_step_time import ACCURACY, CORRECTED_ACCURACY
from megatron_llmjp.estimate.speed.measured_runs import ComparedRun, correction
from megatron_llmjp.estimate.speed.step_parameters import ModelAccuracy
from megatron_llmjp.estimate.speed.step_time import RunLoad, StepTime, run_load, step_time
from megatron_llmjp.estimate.speed.step_work import Software
from megatron_llmjp.estimate.speed.target_gpu import TargetGpu, resolve_gpu

CUDA_RESERVE = 2_500_000_000
"""Bytes assumed for the CUDA context and NCCL buffers."""


@dataclass(frozen=True)
class RunLength:
    """Length of a run, and the setting that determines it."""

    iterations: int
    samples: int
    source: str
    """Origin of the length, for the report."""
    fold_ends: tuple[int, ...] = ()
    """Consumed samples at the end of each fold."""


@dataclass(frozen=True)
class RunEstimate:
    """Memory, communication and duration of a run on given GPUs."""

    config: Config
    gpu: TargetGpu
    layout: ParallelLayout
    memory: tuple[RankMemory, ...]
    """Of one rank of each stage."""
    communication: tuple[CommunicationVolume, ...]
    """Of one rank of each stage."""
    parameters: tuple[int, ...]
    """Of one rank of each stage."""
    step_seconds: float
    """Of a full batch."""
    failures: FailureForecast
    step_time: StepTime | None = None
    """Its terms; None at an assumed MFU."""
    measured_runs: tuple[ComparedRun, ...] = ()
    """Runs on the same machine whose measured steps corrected the step time."""
    length: RunLength | None = None
    """None if the configuration does not determine it."""

    @property
    def seconds(self) -> float | None:
        """Duration of the run without saves and failures; None if its length is unknown."""
        if self.length is None:
            return None
        batches = self.length.samples / self.config.training.global_batch_size
        return batches * self.step_seconds

    @property
    def saved_bytes(self) -> int:
        """Bytes that a rank of the largest stage writes in a save."""
        return largest_save(self.config, self.layout, self.parameters)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization."""
        flops = step_flops(self.config, self.config.training.global_batch_size)
        return flops / self.step_seconds / self.layout.world_size / self.gpu.peak

    @property
    def error_range(self) -> tuple[float, float]:
        """Factors of the step time between which 80 % of published runs are.

        1 at a given MFU, and with experts: no published run of them was compared.
        """
        if self.accuracy is None:
            return 1.0, 1.0
        return self.accuracy.low, self.accuracy.high

    @property
    def accuracy(self) -> ModelAccuracy | None:
        """Errors of the step-time model on published runs, as this estimate uses it.

        None at a given MFU, and with experts.
        """
        if self.step_time is None or self.config.model.has_experts:
            return None
        return CORRECTED_ACCURACY if self.measured_runs else ACCURACY

    @property
    def worst_stage(self) -> int:
        """Stage whose ranks need the most memory."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def fits(self) -> bool:
        """Whether the rank with the highest memory use fits its GPU."""
        return self.memory_fraction <= 1.0

    @property
    def memory_fraction(self) -> float:
        """Fraction of the GPU memory that the rank with the highest memory use needs."""
        return (self.memory[self.worst_stage].total + CUDA_RESERVE) / self.gpu.memory


def estimate_run(
    config: Config,
    machine: PlannedMachine,
    length: RunLength | None = None,
    observed: ObservedJobs | None = None,
    measured_runs: Sequence[ComparedRun] = (),
) -> RunEstimate:
    """Estimate a run on a machine.

    Args:
        config: the run's configuration.
        machine: GPUs, file system and failures.
        length: length of the run.
        observed: the run's jobs so far.
        measured_runs: runs on the same machine that correct the predicted step time.

    Raises:
        UserError: the layout is impossible, or the GPU is unknown.
    """
    gpu = resolve_gpu(config, machine)
    layout = make_layout(config, machine.world_size)
    load = run_load(config, layout, Software())
    parameters = tuple(stage.parameters for stage in load.stages)
    is_async = config.checkpoint.async_save
    seconds, terms = _step_seconds(load, machine, gpu, measured_runs)
    saved = largest_save(config, layout, parameters)
    return RunEstimate(
        config=config,
        gpu=gpu,
        layout=layout,
        memory=tuple(rank_memory(config, layout, stage) for stage in range(layout.pp)),
        communication=tuple(stage.sent for stage in load.stages),
        parameters=parameters,
        step_seconds=seconds,
        failures=forecast_failures(
            machine, checkpoint_bytes(config), saved if is_async else None, observed
        ),
        step_time=terms,
        measured_runs=tuple(measured_runs),
        length=length,
    )


def _step_seconds(
    load: RunLoad, machine: PlannedMachine, gpu: TargetGpu, measured_runs: Sequence[ComparedRun]
) -> tuple[float, StepTime | None]:
    """Return the seconds of a step, and their terms unless the MFU is given."""
    if machine.mfu is None:
        terms = step_time(load, gpu) * correction(measured_runs)
        return terms.total, terms
    flops = step_flops(load.config, load.config.training.global_batch_size)
    return flops / (load.layout.world_size * gpu.peak * machine.mfu), None


def run_length_without_data(config: Config) -> RunLength | None:
    """Return the configured length, or else the end of the learning-rate decay."""
    sizes = BatchSizeSchedule(config)
    iterations, source = last_iteration(config, sizes), "as configured"
    if iterations is None:
        iterations = length_in_iterations(config, "lr_decay")
        source = "until the end of the learning-rate decay"
    if iterations is None:
        return None
    return RunLength(iterations, sizes.consumed_after(iterations), source)
