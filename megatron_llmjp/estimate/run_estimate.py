"""Estimate of a run: memory, communication, FLOPs and days, as numbers and as text.

A run on paper: everything that follows from its configuration and its machine by arithmetic.

A run on paper as text for a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule, last_iteration
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.checkpoints import checkpoint_bytes, count_checkpoints
from megatron_llmjp.estimate.communication import Communication, communicate
from megatron_llmjp.estimate.flops import compute_dtype, step_flops, tflops_per_device
from megatron_llmjp.estimate.gpus import find_gpu, memory_of
from megatron_llmjp.estimate.layout import Chunk, Layout, lay_out
from megatron_llmjp.estimate.memory import Memory, rank_memory, rank_parameters
from megatron_llmjp.estimate.parameters import count_parameters
from megatron_llmjp.formatting import format_bytes, format_count, format_gigabytes, format_table
from megatron_llmjp.run_data import decay_end_iteration

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


def look_ahead(config: Config, rehearsal: PlannedMachine, length: Length | None = None) -> Outlook:
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


def find_machine(config: Config, rehearsal: PlannedMachine) -> Machine:
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
    sizes = BatchSizeSchedule(config)
    found, source = last_iteration(config, sizes), "as asked for"
    if found is None:
        found, source = decay_end_iteration(config), "to the end of the learning rate's decay"
    return None if found is None else Length(found, sizes.consumed_after(found), source)


SHOWN_NODES = 4


@dataclass(frozen=True)
class Anchor:
    """A published figure of the model that a preset is named for."""

    text: str
    steps: int
    a_day_on: tuple[str, int] | None = None
    """GPUs that do so many steps a day; None where ``steps`` is the length of the run."""


ANCHORS = {
    "llm-jp-3-172b": Anchor("about 2,000 steps a day on 512 H100", 2000, ("H100", 512)),
    "llm-jp-3-13b": Anchor("about 20,000 steps a day on 256 H100", 20000, ("H100", 256)),
    "llm-jp-13b-v1.0": Anchor("87,870 steps for its ten folds, on 96 A100 40 GB", 87870),
    "llm-jp-1.3b-v1.0": Anchor("87,430 steps for its ten folds, on 96 A100 40 GB", 87430),
}


def format_estimate(outlook: Outlook, mfu: float, name: str | None = None) -> str:
    """The whole report, without warnings."""
    return "\n\n".join(
        [
            _head(outlook),
            picture(outlook.layout, outlook.machine.per_node, outlook.parameters),
            _memory(outlook),
            _traffic(outlook),
            _time(outlook, mfu, name),
        ]
    )


def _head(outlook: Outlook) -> str:
    layout, counts = outlook.layout, count_parameters(outlook.config)
    number, size = layout.micro_batches, outlook.config.training.micro_batch_size
    return (
        f"{layout.world_size} {outlook.machine.name}: {shape(layout)}; each replica does "
        f"{number} micro-batch{'es' if number > 1 else ''} of {size} in a step\n"
        f"{counts.total:,} parameters, {counts.non_embedding:,} without embeddings; "
        f"{outlook.config.padded_vocab_size:,} rows"
    )


def shape(layout: Layout) -> str:
    """``TP 4 x PP 16 x DP 8``."""
    parts = [f"TP {layout.tp}", f"PP {layout.pp}"]
    parts += [f"VP {layout.vp}"] if layout.vp > 1 else []
    parts += [f"CP {layout.cp}"] if layout.cp > 1 else []
    return " x ".join([*parts, f"DP {layout.dp}"])


def picture(layout: Layout, per_node: int, parameters: Sequence[int]) -> str:
    """Which node holds which part: a line per pipeline stage."""
    rows = [("stage", "layers", "parameters", "ranks", "nodes, and the replicas they hold")]
    for stage, chunks in enumerate(layout.stages):
        first, last = _ranks(layout, stage)
        layers, nodes = " ".join(map(_chunk, chunks)), _nodes(layout, stage, per_node)
        rows.append((str(stage), layers, f"{parameters[stage]:,}", _range(first, last), nodes))
    together = layout.tp * layout.cp
    kinds = f"TP {layout.tp}" + (f" x CP {layout.cp}" if layout.cp > 1 else "")
    gpus = f"{together} neighbouring GPUs ({kinds})" if together > 1 else "1 GPU"
    notes = [f"a replica of a stage is {gpus}; parameters are those of one GPU"]
    notes += ["E: embedding, L: output layer and loss"]
    if together > per_node:
        notes += ["a tensor-parallel group spans nodes: its traffic goes over the network"]
    return "\n".join([format_table(rows, right=(2,)), *notes])


def _ranks(layout: Layout, stage: int) -> tuple[int, int]:
    """The first and the last rank of a stage."""
    last = layout.rank(layout.tp - 1, layout.cp - 1, layout.dp - 1, stage)
    return layout.rank(0, 0, 0, stage), last


def _nodes(layout: Layout, stage: int, per_node: int) -> str:
    """``n0 d0-1  n1 d2-3``: two nodes with two replicas each; ``n0:4-7 d0`` is half a node."""
    first, last = _ranks(layout, stage)
    cells = []
    for node in range(first // per_node, last // per_node + 1):
        start, end = max(first, node * per_node), min(last, (node + 1) * per_node - 1)
        gpus = f":{_range(start % per_node, end % per_node)}" if end - start + 1 < per_node else ""
        replicas = ((rank // (layout.tp * layout.cp)) % layout.dp for rank in (start, end))
        cells.append(f"n{node}{gpus} d{_range(*replicas)}")
    return "  ".join(cells if len(cells) <= SHOWN_NODES else [*cells[:2], "...", cells[-1]])


def _chunk(chunk: Chunk) -> str:
    layers = _range(chunk.first_layer + 1, chunk.first_layer + chunk.layers)
    parts = [*(["E"] if chunk.embedding else []), layers if chunk.layers else ""]
    return "+".join([part for part in [*parts, "L" if chunk.output else ""] if part]) or "-"


def _memory(outlook: Outlook) -> str:
    """Memory by kind of the first, the fullest and the last stage."""
    stages = sorted({0, outlook.worst, outlook.layout.pp - 1})
    rows = [("memory of a GPU", *(f"stage {s}" for s in stages))]
    for kind in Memory.__dataclass_fields__:
        rows.append(
            (f"  {kind}", *(format_gigabytes(getattr(outlook.memory[s], kind)) for s in stages))
        )
    rows.append(("  together", *(format_gigabytes(outlook.memory[s].total) for s in stages)))
    most, capacity = outlook.memory[outlook.worst].total, outlook.machine.memory
    return (
        f"{format_table(rows, right=range(1, len(stages) + 1))}\n"
        f"{'fits' if outlook.fits else 'DOES NOT FIT'}: {most / 1e9:.1f} GB and "
        f"{RESERVE / 1e9:.1f} GB for CUDA and NCCL are {outlook.filled:.0%} of "
        f"{capacity / 1e9:.0f} GB"
    )


def _traffic(outlook: Outlook) -> str:
    """What goes out of a GPU, and whether its group lies in one node."""
    layout, per_node = outlook.layout, outlook.machine.per_node
    reach = {"tensor": layout.tp * layout.cp, "pipeline": layout.world_size}
    stages = sorted({0, layout.pp // 2, layout.pp - 1})
    rows = [("sent by a GPU in a step", *(f"stage {s}" for s in stages))]
    for kind in Communication.__dataclass_fields__:
        sent = [getattr(outlook.traffic[s], kind) for s in stages]
        ranks = layout.world_size if kind == "embedding" else layout.tp * layout.cp * layout.dp
        where = "inside a node" if reach.get(kind, ranks) <= per_node else "network"
        if any(sent):
            rows.append((f"  {kind} ({where})", *map(format_gigabytes, sent)))
    if len(rows) == 1:
        return "nothing is sent: there is one GPU"
    return format_table(rows, right=range(1, len(stages) + 1))


def _time(outlook: Outlook, mfu: float, name: str | None) -> str:
    config, batch = outlook.config, outlook.config.training.global_batch_size
    tokens, steps = batch * config.data.seq_length, SECONDS_PER_DAY / outlook.step_seconds
    flops = format_count(step_flops(config, batch))
    rows = [
        (
            "a step",
            f"{tokens:,} tokens, {flops[:-1]} {flops[-1]}FLOP, pipeline bubble "
            f"{outlook.layout.bubble:.1%}",
        ),
        (
            f"at {mfu:.0%} MFU",
            f"{outlook.step_seconds:.2f} s a step, {steps:,.0f} steps and "
            f"{format_count(steps * tokens)} tokens a day",
        ),
        ("the run", _length(outlook)),
        ("checkpoints", _checkpoints(outlook)),
    ]
    if name in ANCHORS:
        rows.append(("published", _published(ANCHORS[name], config)))
    return format_table(rows, right=())


def _length(outlook: Outlook) -> str:
    length, config = outlook.length, outlook.config
    if length is None:
        return "of unknown length: give --train-iters or --fold-file"
    days = length.samples / config.training.global_batch_size * outlook.step_seconds
    tokens = length.samples * config.data.seq_length
    return (
        f"{length.iterations:,} steps ({length.source}), {format_count(tokens)} tokens: "
        f"{days / SECONDS_PER_DAY:,.1f} days"
    )


def _checkpoints(outlook: Outlook) -> str:
    config, length = outlook.config, outlook.length
    size = checkpoint_bytes(config)
    if length is None:
        return f"of {format_bytes(size)} each"
    seconds = outlook.step_seconds
    found = count_checkpoints(config, length.iterations, length.fold_ends, seconds)
    if found.written == 1:
        return f"1 of {format_bytes(size)}, at the end"
    return (
        f"{found.written:,} of {format_bytes(size)} are written, {found.kept:,} stay: "
        f"{format_bytes(found.kept * size)}"
    )


def _published(anchor: Anchor, config: Config) -> str:
    batch = config.training.global_batch_size
    if anchor.a_day_on is None:
        return (
            f"{anchor.text}: {format_count(anchor.steps * batch * config.data.seq_length)} tokens"
        )
    gpu, number = anchor.a_day_on
    speed = tflops_per_device(config, batch * anchor.steps, SECONDS_PER_DAY, number)
    known = find_gpu(gpu)
    assert known is not None
    return f"{anchor.text}, which is {speed / known.half:.0%} MFU"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
