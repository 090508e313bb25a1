"""A run on paper: everything that follows from its configuration and its machine by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.rehearsal import Rehearsal
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.data.run_length import last_iteration
from megatron_llmjp.errors import UserError
from megatron_llmjp.plan.communication import Communication, communicate
from megatron_llmjp.plan.flops import compute_dtype, step_flops
from megatron_llmjp.plan.gpus import find_gpu, memory_of
from megatron_llmjp.plan.layout import Layout, lay_out
from megatron_llmjp.plan.memory import Memory, rank_memory, rank_parameters
from megatron_llmjp.prepare_data import decay_end

SECONDS_PER_DAY = 86400.0
RESERVE = 2_500_000_000
"""Bytes that CUDA's context and NCCL's buffers take."""


@dataclass(frozen=True)
class Machine:
    """The GPU that a run is planned for."""

    name: str
    memory: float
    """Bytes."""
    peak: float
    """FLOP/s in the type of the run."""
    per_node: int


@dataclass(frozen=True)
class Length:
    """How long a run is."""

    iterations: int
    samples: int
    source: str
    """What says so, for people."""
    fold_ends: tuple[int, ...] = ()
    """Samples trained on when each fold ends."""


@dataclass(frozen=True)
class Outlook:
    """What a run will be."""

    config: Config
    machine: Machine
    layout: Layout
    memory: tuple[Memory, ...]
    """Of a rank of each stage."""
    traffic: tuple[Communication, ...]
    parameters: tuple[int, ...]
    """Of a rank of each stage."""
    step_seconds: float
    """Of a full batch, at the assumed MFU."""
    length: Length | None = None
    """None where nothing says it."""

    @property
    def worst(self) -> int:
        """The stage whose ranks need the most memory."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits its GPU."""
        return self.filled <= 1.0

    @property
    def filled(self) -> float:
        """The part of its GPU's memory that the fullest rank takes."""
        return (self.memory[self.worst].total + RESERVE) / self.machine.memory

    @property
    def steps_per_day(self) -> float:
        """At the assumed MFU."""
        return SECONDS_PER_DAY / self.step_seconds


def look_ahead(config: Config, rehearsal: Rehearsal, length: Length | None = None) -> Outlook:
    """Work a run out.

    Raises:
        UserError: the layout does not divide, or the GPU is unknown.
    """
    machine = find_machine(config, rehearsal)
    layout = lay_out(config, rehearsal.world_size)
    stages = range(layout.pp)
    flops = step_flops(config, config.training.global_batch_size)
    return Outlook(
        config=config,
        machine=machine,
        layout=layout,
        memory=tuple(rank_memory(config, layout, stage) for stage in stages),
        traffic=tuple(communicate(config, layout, stage) for stage in stages),
        parameters=tuple(rank_parameters(config, layout, layout.stages[s]) for s in stages),
        step_seconds=flops / (layout.world_size * machine.peak * rehearsal.mfu),
        length=length,
    )


def find_machine(config: Config, rehearsal: Rehearsal) -> Machine:
    """The GPU that is asked for.

    Raises:
        UserError: nothing is known of it, or it cannot compute in the type of the run.
    """
    gpu, dtype = find_gpu(rehearsal.gpu), compute_dtype(config)
    if gpu is None:
        raise UserError(
            f"--gpu {rehearsal.gpu}: nothing is known of this GPU; take one such as A100, H100, "
            "H200 or B200"
        )
    peak = config.logging.gpu_peak_tflops or gpu.peak_tflops(dtype)
    if peak is None:
        raise UserError(f"--gpu {gpu.name}: it does not compute in {dtype}; take --fp16")
    memory = rehearsal.gpu_memory or memory_of(rehearsal.gpu) or 0.0
    return Machine(gpu.name, memory, peak * 1e12, rehearsal.gpus_per_node)


def length_without_data(config: Config) -> Length | None:
    """What the training section asks for, or else the end of the learning rate's decay."""
    sizes = BatchSizes(config)
    found, source = last_iteration(config, sizes), "as asked for"
    if found is None:
        found, source = decay_end(config), "to the end of the learning rate's decay"
    return None if found is None else Length(found, sizes.consumed_after(found), source)
