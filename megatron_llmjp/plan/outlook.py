"""A run on paper: everything that follows from its configuration and its machine by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.rehearsal import Rehearsal
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.errors import UserError
from megatron_llmjp.plan.communication import Communication, communicate
from megatron_llmjp.plan.flops import compute_dtype, step_flops
from megatron_llmjp.plan.gpus import find_gpu
from megatron_llmjp.plan.layout import Layout, lay_out
from megatron_llmjp.plan.memory import Memory, element_size, rank_memory, rank_parameters
from megatron_llmjp.plan.parameters import count_parameters
from megatron_llmjp.prepare_data import count_iterations, prepare_data

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
    train_iters: int | None
    step_seconds: float
    """At the assumed MFU."""

    @property
    def worst(self) -> int:
        """The stage whose ranks need the most memory."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits its GPU."""
        return self.memory[self.worst].total + RESERVE <= self.machine.memory

    @property
    def steps_per_day(self) -> float:
        """At the assumed MFU."""
        return SECONDS_PER_DAY / self.step_seconds

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, and the optimizer's copy and states in fp32."""
        states = 3 if self.config.optimizer.optimizer == "adam" else 2
        each = element_size(self.config) + 4 * states
        return count_parameters(self.config).total * each


def look_ahead(config: Config, rehearsal: Rehearsal) -> Outlook:
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
        train_iters=iterations(config),
        step_seconds=flops / (layout.world_size * machine.peak * rehearsal.mfu),
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
    memory = rehearsal.gpu_memory or gpu.memory * 1e9
    return Machine(gpu.name, memory, peak * 1e12, rehearsal.gpus_per_node)


def iterations(config: Config) -> int | None:
    """Iterations of the run, or the end of its decay where nothing else tells; None if nothing."""
    training = config.training
    if config.data.fold_file is not None:
        return count_iterations(config, prepare_data(config).schedule)[0]
    asked = _iterations(config, training.train_iters, training.train_samples, training.train_tokens)
    return asked if asked is not None else decay_end(config)


def decay_end(config: Config) -> int | None:
    """The iteration that the learning rate's decay ends at; None if the run's end is meant."""
    o = config.optimizer
    return _iterations(config, o.lr_decay_iters, o.lr_decay_samples, o.lr_decay_tokens)


def _iterations(
    config: Config, iters: int | None, samples: int | None, tokens: int | None
) -> int | None:
    """A length in whichever unit it is given."""
    if tokens is not None:
        samples = tokens // config.data.seq_length
    return iters if samples is None else BatchSizes(config).iterations(samples)[0]
