"""Search over parallel layouts: which fit into memory, and which would be fast.

A search over layouts: which fit, and which of them would be fast.

Memory is exact enough to decide (``memory.py``); speed is an estimate to rank by, not a promise:
matrix products at a fixed part of the peak, less where their pieces are small; the pipeline's
bubble; recomputation as operations; traffic inside a node at the speed of its links, between nodes
at that of its network, of which half the gradient traffic hides behind the backward pass.

Suggested layouts as a table for a terminal, with what to say of the given one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.flops import flops_by_part, step_flops
from megatron_llmjp.estimate.run_estimate import Machine, Outlook, look_ahead, shape
from megatron_llmjp.formatting import format_table

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


def suggest(config: Config, rehearsal: PlannedMachine) -> list[Suggestion]:
    """All layouts that fit, fastest first; the given one is among them if it fits."""
    own = _key(config)
    # What was padded for one tensor-parallel size need not hold for another.
    config = replace_fields(config, padded_vocab_size=None)
    found: list[Suggestion] = []
    for candidate in [config, *_candidates(config, rehearsal)]:
        try:
            check_config(candidate, rehearsal.world_size)
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


def _candidates(config: Config, rehearsal: PlannedMachine) -> Iterator[Config]:
    tensor = [t for t in (1, 2, 4, 8) if t <= rehearsal.gpus_per_node]
    stages = [p for p in range(1, config.model.num_layers + 1) if config.model.num_layers % p == 0]
    keep = KEEP_ALL if config.parallel.recompute_granularity == "full" else {}
    recompute = (keep, RECOMPUTE_ALL)
    for t, p, v, b, again in product(tensor, stages, VIRTUAL, MICRO_BATCHES, recompute):
        replicas, rest = divmod(rehearsal.world_size, t * p)
        whole = replicas and not rest and config.training.global_batch_size % (replicas * b) == 0
        if not whole or (v is not None and (p == 1 or config.model.num_layers % (p * v))):
            continue
        yield replace_fields(
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


SHOWN = 6
KINDS = {
    "computing": "computing",
    "waiting": "bubble",
    "tensor": "TP sends",
    "pipeline": "PP sends",
    "replicas": "DP sends",
}
WORTH_TELLING = 0.005
"""Part of a step from which a difference is a reason."""


def show_suggestions(config: Config, rehearsal: PlannedMachine, found: list[Suggestion]) -> str:
    """The best layouts, where their time goes, and where the given one stands among them."""
    gpu = rehearsal.gpu
    if rehearsal.gpu_memory:
        gpu += f" with {rehearsal.gpu_memory / 1e9:.0f} GB"
    head = (
        f"{rehearsal.world_size} {gpu}, global batch {config.training.global_batch_size}, "
        f"{config.data.seq_length} tokens: "
    )
    if not found:
        return head + "no layout fits; more GPUs, or GPUs of more memory, are needed"
    given = next((s for s in found if s.given), None)
    shown = _best_of_each(found)[:SHOWN]
    shown += [given] if given and given not in shown else []
    columns = ("layout", "micro-batch", "recompute", "memory", "MFU", "a step", *KINDS.values())
    rows = [columns, *(_row(s) for s in shown)]
    return "\n".join(
        [
            f"{head}{len(found)} layouts fit; the fastest of each TP and PP, by estimated seconds",
            format_table(rows, right=(1, *range(3, len(columns)))),
            _verdict(found, given),
            f"flags of the first: {flags(found[0].outlook.config)}",
        ]
    )


def _row(suggestion: Suggestion) -> tuple[str, ...]:
    outlook, times = suggestion.outlook, suggestion.times
    again = outlook.config.parallel.recompute_granularity == "full"
    return (
        shape(outlook.layout) + (" (given)" if suggestion.given else ""),
        str(outlook.config.training.micro_batch_size),
        "all layers" if again else "",
        f"{outlook.filled:.0%}",
        f"{suggestion.mfu:.0%}",
        f"{times.total:.2f}",
        *(_seconds(getattr(times, kind)) for kind in KINDS),
    )


def _seconds(number: float) -> str:
    return f"{number:.2f}" if number else ""


def _best_of_each(found: list[Suggestion]) -> list[Suggestion]:
    """The fastest of each tensor and pipeline size: variants of one layout say little more."""
    best: dict[tuple[int, int], Suggestion] = {}
    for suggestion in found:
        layout = suggestion.outlook.layout
        best.setdefault((layout.tp, layout.pp), suggestion)
    return list(best.values())


def _verdict(found: list[Suggestion], given: Suggestion | None) -> str:
    """What to say of the configuration's own layout."""
    if given is None:
        return "the given layout does not run or fit"
    place = found.index(given) + 1
    if place == 1:
        return "the given layout fits, and none is faster by this estimate"
    return (
        f"the given layout fits, number {place} of {len(found)}; the first takes "
        f"{1 - found[0].times.total / given.times.total:.0%} less time: "
        f"{_reasons(found[0].times, given.times)}"
    )


def _reasons(best: Times, given: Times) -> str:
    """What makes one layout faster than another."""
    parts = []
    for field in fields(Times):
        saved = getattr(given, field.name) - getattr(best, field.name)
        if abs(saved) >= WORTH_TELLING * given.total:
            more = "less" if saved > 0 else "more"
            parts.append((saved, f"{KINDS[field.name]} {abs(saved):.2f} s {more}"))
    return ", ".join(text for _, text in sorted(parts, reverse=True))


def flags(config: Config) -> str:
    """The flags that make a configuration of the same preset have this layout."""
    parallel = config.parallel
    words = [
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}",
        f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}",
        f"--micro-batch-size {config.training.micro_batch_size}",
        "--use-distributed-optimizer",
        f"--{'' if parallel.sequence_parallel else 'no-'}sequence-parallel",
    ]
    if parallel.virtual_pipeline_model_parallel_size:
        chunks = parallel.virtual_pipeline_model_parallel_size
        words.append(f"--virtual-pipeline-model-parallel-size {chunks}")
    if parallel.recompute_granularity == "full":
        words.append(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        )
    return " ".join(words)
