"""A search over layouts: which fit, and which of them would be fast.

Memory is exact enough to decide (``memory.py``); speed is an estimate to rank by, not a promise:
matrix products at a fixed part of the peak, less where their pieces are small; the pipeline's
bubble; recomputation as operations; traffic inside a node at the speed of its links, between nodes
at that of its network, of which half the gradient traffic hides behind the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product

from megatron_llmjp.config.checks import check
from megatron_llmjp.config.load import changed
from megatron_llmjp.config.rehearsal import Rehearsal
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.plan.flops import flops_by_part, step_flops
from megatron_llmjp.plan.outlook import Machine, Outlook, look_ahead

MICRO_BATCHES = (1, 2, 4, 8)
VIRTUAL = (None, 2, 3, 4, 5, 6)
KEEP_ALL: dict[str, object] = {
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
}
RECOMPUTE_ALL: dict[str, object] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
FULL = 0.95
"""Part of a GPU's memory that a suggestion may fill: predictions are off by up to 5 %."""
PRODUCTS = 0.62
"""Part of the peak that large matrix products and attention reach together."""
SMALL = 1.2e6
"""Elements of a rank's piece of an activation at which half of that is reached."""
LINKS = {"A100": (250e9, 20e9), "V100": (120e9, 10e9), "B200": (700e9, 45e9)}
"""Bytes per second of a GPU inside its node and over the network, as collectives see them."""
HOPPER = (370e9, 42e9)


@dataclass(frozen=True)
class Times:
    """Estimated seconds of a step, by what they are spent on."""

    computing: float
    waiting: float
    """For the pipeline to fill and drain."""
    tensor: float
    """Traffic among the ranks of a layer, and so on."""
    pipeline: float
    replicas: float

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits, and an estimate of its speed."""

    outlook: Outlook
    times: Times
    given: bool
    """Whether it is the configuration's own."""

    @property
    def mfu(self) -> float:
        """Estimated model FLOP/s utilisation."""
        config, machine = self.outlook.config, self.outlook.machine
        flops = step_flops(config, config.training.global_batch_size)
        return flops / self.times.total / self.outlook.layout.world_size / machine.peak


def suggest(config: Config, rehearsal: Rehearsal) -> list[Suggestion]:
    """All layouts that fit, fastest first; the given one is among them if it fits."""
    own = _key(config)
    # What was padded for one tensor-parallel size need not hold for another.
    config = changed(config, padded_vocab_size=None)
    found: list[Suggestion] = []
    for candidate in [config, *_candidates(config, rehearsal)]:
        try:
            check(candidate, rehearsal.world_size)
            outlook = look_ahead(candidate, rehearsal)
        except UserError:
            continue
        given = _key(candidate) == own
        if given and any(other.given for other in found):
            continue
        if outlook.filled <= (1.0 if given else FULL):
            found.append(Suggestion(outlook, estimate(outlook), given))
    return sorted(found, key=lambda suggestion: suggestion.times.total)


def _key(config: Config) -> tuple[object, ...]:
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        config.training.micro_batch_size,
        parallel.recompute_granularity == "full",
    )


def _candidates(config: Config, rehearsal: Rehearsal) -> Iterator[Config]:
    tensor = [t for t in (1, 2, 4, 8) if t <= rehearsal.gpus_per_node]
    stages = [p for p in range(1, config.model.num_layers + 1) if config.model.num_layers % p == 0]
    keep = KEEP_ALL if config.parallel.recompute_granularity == "full" else {}
    recompute = (keep, RECOMPUTE_ALL)
    for t, p, v, b, again in product(tensor, stages, VIRTUAL, MICRO_BATCHES, recompute):
        replicas, rest = divmod(rehearsal.world_size, t * p)
        whole = replicas and not rest and config.training.global_batch_size % (replicas * b) == 0
        if not whole or (v is not None and (p == 1 or config.model.num_layers % (p * v))):
            continue
        yield changed(
            config,
            tensor_model_parallel_size=t,
            sequence_parallel=t > 1,
            pipeline_model_parallel_size=p,
            virtual_pipeline_model_parallel_size=v,
            use_distributed_optimizer=True,
            micro_batch_size=b,
            **again,
        )


def estimate(outlook: Outlook) -> Times:
    """Where the time of a step goes."""
    config, layout, machine = outlook.config, outlook.layout, outlook.machine
    slowest = max(range(layout.pp), key=lambda s: _stage_seconds(outlook, s))
    traffic = outlook.traffic[slowest]
    inside, network = LINKS.get(machine.name, HOPPER)
    among_replicas = inside if layout.tp * layout.dp <= machine.per_node else network
    overlapped = 0.5 if config.parallel.overlap_grad_reduce or layout.pp == 1 else 1.0
    exchange = overlapped * (traffic.gradients + traffic.parameters) / among_replicas
    computing = _stage_seconds(outlook, slowest)
    tensor, pipeline = traffic.tensor / inside, traffic.pipeline / network
    busy = computing + tensor + pipeline
    return Times(
        computing=computing,
        waiting=busy * (layout.pp - 1) / (layout.vp * layout.micro_batches),
        tensor=tensor,
        pipeline=pipeline,
        replicas=exchange + traffic.embedding / network,
    )


def _stage_seconds(outlook: Outlook, stage: int) -> float:
    """Time that a rank of a stage computes in a step."""
    config, layout, machine = outlook.config, outlook.layout, outlook.machine
    parts = flops_by_part(config)
    layers = sum(chunk.layers for chunk in layout.stages[stage])
    flops = (parts.total - parts.logits) * layers / config.model.num_layers
    if config.parallel.recompute_granularity == "full":
        flops *= 4 / 3
    if any(chunk.output for chunk in layout.stages[stage]):
        flops += parts.logits
    samples = layout.micro_batches * config.training.micro_batch_size
    return flops * samples / layout.tp / layout.cp / _speed(outlook, machine)


def _speed(outlook: Outlook, machine: Machine) -> float:
    """FLOP/s of a GPU on pieces of this size."""
    config, layout = outlook.config, outlook.layout
    tokens = config.training.micro_batch_size * config.data.seq_length // layout.cp
    piece = tokens * config.model.hidden_size / layout.tp
    return machine.peak * PRODUCTS * piece / (piece + SMALL)
