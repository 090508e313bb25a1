"""A search over layouts: which fit, and which of them would be fast.

Memory is exact enough to decide (``memory.py``); speed is an estimate to rank by, not a promise:
matrix products at a fixed part of the peak, less where their pieces are small; the pipeline's
bubble; recomputation as operations; traffic inside a node at the speed of its links, between nodes
at that of its network, of which half the gradient traffic hides behind the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_llmjp.config.checks import check
from megatron_llmjp.config.load import changed
from megatron_llmjp.config.rehearsal import Rehearsal
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.plan.flops import flops_by_part, step_flops
from megatron_llmjp.plan.outlook import Machine, Outlook, look_ahead
from megatron_llmjp.plan.outlook_text import shape, table

SHOWN = 6
MICRO_BATCHES = (1, 2, 4, 8)
VIRTUAL = (None, 2, 3, 4, 5, 6)
RECOMPUTE: tuple[dict[str, object], ...] = (
    {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None},
    {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
)
PRODUCTS = 0.62
"""Part of the peak that large matrix products and attention reach together."""
SMALL = 1.2e6
"""Elements of a rank's piece of an activation at which half of that is reached."""
LINKS = {"A100": (250e9, 20e9), "V100": (120e9, 10e9), "B200": (700e9, 45e9)}
"""Bytes per second of a GPU inside its node and over the network, as collectives see them."""
HOPPER = (370e9, 42e9)


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits, and an estimate of its speed."""

    outlook: Outlook
    seconds: float
    """Of a step."""
    given: bool
    """Whether it is the configuration's own."""

    @property
    def mfu(self) -> float:
        """Estimated model FLOP/s utilisation."""
        config, machine = self.outlook.config, self.outlook.machine
        flops = step_flops(config, config.training.global_batch_size)
        return flops / self.seconds / self.outlook.layout.world_size / machine.peak


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
        if outlook.fits and not (given and any(other.given for other in found)):
            found.append(Suggestion(outlook, estimate(outlook), given))
    return sorted(found, key=lambda suggestion: suggestion.seconds)


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
    for t, p, v, b, again in product(tensor, stages, VIRTUAL, MICRO_BATCHES, RECOMPUTE):
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


def estimate(outlook: Outlook) -> float:
    """Seconds of a step."""
    config, layout, machine = outlook.config, outlook.layout, outlook.machine
    worst = max(range(layout.pp), key=lambda s: _stage_seconds(outlook, s))
    busy = _stage_seconds(outlook, worst)
    traffic = outlook.traffic[worst]
    inside, network = LINKS.get(machine.name, HOPPER)
    among_replicas = inside if layout.tp * layout.dp <= machine.per_node else network
    busy += traffic.tensor / inside + traffic.pipeline / network
    waiting = busy * (layout.pp - 1) / (layout.vp * layout.micro_batches)
    overlapped = 0.5 if config.parallel.overlap_grad_reduce or layout.pp == 1 else 1.0
    exchange = overlapped * (traffic.gradients + traffic.parameters) / among_replicas
    return busy + waiting + exchange + traffic.embedding / network


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


def show_suggestions(config: Config, rehearsal: Rehearsal, found: list[Suggestion]) -> str:
    """The best layouts with their reasons, and where the given one stands among them."""
    memory = f"{rehearsal.gpu_memory / 1e9:.0f} GB" if rehearsal.gpu_memory else "its own memory"
    head = f"{rehearsal.world_size} {rehearsal.gpu} with {memory}, global batch "
    head += f"{config.training.global_batch_size}, {config.data.seq_length} tokens: "
    if not found:
        return head + "no layout fits; more GPUs, or GPUs of more memory, are needed"
    best = found[0].seconds
    given = next((s for s in found if s.given), None)
    shown = _best_of_each(found)[:SHOWN]
    shown += [given] if given and given not in shown else []
    rows = [("layout", "micro-batch", "memory", "step", "MFU", "against the best", "because")]
    for s in shown:
        memory = f"{s.outlook.memory[s.outlook.worst].total / s.outlook.machine.memory:.0%}"
        name = shape(s.outlook.layout) + (" (given)" if s.given else "")
        slower = "best" if s.seconds == best else f"+{s.seconds / best - 1:.0%}"
        size = str(s.outlook.config.training.micro_batch_size)
        step, mfu = f"{s.seconds:.2f} s", f"{s.mfu:.0%}"
        rows.append((name, size, memory, step, mfu, slower, reasons(s.outlook)))
    lines = [f"{head}{len(found)} layouts fit", table(rows, right=(1, 2, 3, 4)), _verdict(found)]
    return "\n".join([*lines, f"flags of the best: {_flags(found[0].outlook.config)}"])


def _best_of_each(found: list[Suggestion]) -> list[Suggestion]:
    """The fastest of each tensor and pipeline size: variants of one layout say little more."""
    best: dict[tuple[int, int], Suggestion] = {}
    for suggestion in found:
        layout = suggestion.outlook.layout
        best.setdefault((layout.tp, layout.pp), suggestion)
    return list(best.values())


def _verdict(found: list[Suggestion]) -> str:
    """What to say of the configuration's own layout."""
    given = next((s for s in found if s.given), None)
    if given is None:
        return "the given layout does not run or fit"
    place = found.index(given) + 1
    return f"the given layout fits, number {place} of {len(found)} by this estimate" + (
        "" if place > 1 else ": there is no better one"
    )


def reasons(outlook: Outlook) -> str:
    """Where a layout's time goes besides its operations."""
    layout, traffic = outlook.layout, outlook.traffic[outlook.worst]
    parts = [f"bubble {layout.bubble:.1%}"] if layout.pp > 1 else ["no bubble"]
    if traffic.tensor:
        parts.append(f"TP sends {traffic.tensor / 1e9:.0f} GB")
    if layout.dp > 1:
        parts.append(f"DP sends {(traffic.gradients + traffic.parameters) / 1e9:.0f} GB")
    if outlook.config.parallel.recompute_granularity == "full":
        parts.append("recomputes all layers")
    return ", ".join(parts)


def _flags(config: Config) -> str:
    parallel = config.parallel
    words = [
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}",
        f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}",
        f"--micro-batch-size {config.training.micro_batch_size}",
        "--use-distributed-optimizer",
    ]
    if parallel.virtual_pipeline_model_parallel_size:
        chunks = parallel.virtual_pipeline_model_parallel_size
        words.append(f"--virtual-pipeline-model-parallel-size {chunks}")
    if parallel.sequence_parallel:
        words.append("--sequence-parallel")
    if parallel.recompute_granularity == "full":
        words.append(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        )
    return " ".join(words)
