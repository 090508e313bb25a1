"""Estimate of a run: memory, communication, FLOPs, duration, checkpoints, and its text report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule, last_iteration
from megatron_llmjp.data.lr_schedule import length_in_iterations
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.checkpoints import (
    CheckpointCounts,
    checkpoint_bytes,
    count_checkpoints,
    rank_save_bytes,
)
from megatron_llmjp.estimate.communication import CommunicationVolume, communication_volume
from megatron_llmjp.estimate.failure_report import (
    FailureForecast,
    forecast_failures,
    format_failures,
)
from megatron_llmjp.estimate.failures import ObservedJobs
from megatron_llmjp.estimate.flops import compute_dtype, step_flops, tflops_per_device
from megatron_llmjp.estimate.gpus import find_gpu, gpu_memory, peak_tflops
from megatron_llmjp.estimate.layout import ModelChunk, ParallelLayout, make_layout
from megatron_llmjp.estimate.memory import RankMemory, rank_memory, rank_parameters
from megatron_llmjp.formatting import format_bytes, format_count, format_gigabytes, format_table

SECONDS_PER_DAY = 86400.0
CUDA_RESERVE = 2_500_000_000
"""Bytes assumed for the CUDA context and NCCL buffers."""

SHOWN_NODES = 4
"""Nodes of a stage that are printed; of more, the first two and the last."""


@dataclass(frozen=True)
class TargetGpu:
    """GPU that a run is estimated for."""

    name: str
    memory: float
    """Bytes."""
    peak: float
    """FLOP/s in the dtype of the run."""
    per_node: int


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
    """Of a full batch, at the assumed MFU."""
    failures: FailureForecast
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
) -> RunEstimate:
    """Estimate a run on a machine.

    Args:
        config: the run's configuration.
        machine: GPUs, file system and failures.
        length: length of the run.
        observed: the run's jobs so far.

    Raises:
        UserError: the layout is impossible, or the GPU is unknown.
    """
    gpu = resolve_gpu(config, machine)
    layout = make_layout(config, machine.world_size)
    stages = range(layout.pp)
    flops = step_flops(config, config.training.global_batch_size)
    parameters = tuple(rank_parameters(config, layout, layout.stages[s]) for s in stages)
    is_async = config.checkpoint.async_save
    copied = rank_save_bytes(config, layout, max(parameters)) if is_async else None
    return RunEstimate(
        config=config,
        gpu=gpu,
        layout=layout,
        memory=tuple(rank_memory(config, layout, stage) for stage in stages),
        communication=tuple(communication_volume(config, layout, stage) for stage in stages),
        parameters=parameters,
        step_seconds=flops / (layout.world_size * gpu.peak * machine.mfu),
        failures=forecast_failures(machine, checkpoint_bytes(config), copied, observed),
        length=length,
    )


def resolve_gpu(config: Config, machine: PlannedMachine) -> TargetGpu:
    """Look up the GPU of a machine, with its peak in the dtype of the run.

    Raises:
        UserError: the GPU is unknown or does not support the dtype.
    """
    gpu, dtype = find_gpu(machine.gpu), compute_dtype(config)
    if gpu is None:
        raise UserError(
            f"--gpu {machine.gpu}: unknown GPU; expected a name such as A100, H100, H200 or B200"
        )
    peak = config.logging.gpu_peak_tflops or gpu.peak_tflops(dtype)
    if peak is None:
        raise UserError(f"--gpu {gpu.name} does not support {dtype}: use --fp16")
    memory = machine.gpu_memory or gpu_memory(machine.gpu) or 0.0
    return TargetGpu(gpu.name, memory, peak * 1e12, machine.gpus_per_node)


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


@dataclass(frozen=True)
class PublishedFigure:
    """Published speed or length of the model that a preset is named after."""

    text: str
    steps: int
    per_day_on: tuple[str, int] | None = None
    """GPU model and count for ``steps`` per day; None if ``steps`` is the length of the run."""


PUBLISHED_FIGURES = {
    "llm-jp-3-172b": PublishedFigure("about 2,000 steps per day on 512 H100", 2000, ("H100", 512)),
    "llm-jp-3-13b": PublishedFigure("about 20,000 steps per day on 256 H100", 20000, ("H100", 256)),
    "llm-jp-13b-v1.0": PublishedFigure("87,870 steps for its ten folds, on 96 A100 40 GB", 87870),
    "llm-jp-1.3b-v1.0": PublishedFigure("87,430 steps for its ten folds, on 96 A100 40 GB", 87430),
}


def format_estimate(estimate: RunEstimate, mfu: float, name: str | None = None) -> str:
    """Format the whole report, without warnings."""
    return "\n\n".join(
        [
            _header(estimate),
            format_rank_placement(estimate.layout, estimate.gpu.per_node, estimate.parameters),
            _memory(estimate),
            _communication(estimate),
            _duration(estimate, mfu, name),
            format_failures(
                estimate.failures,
                estimate.step_seconds,
                estimate.seconds,
                _count_checkpoints(estimate).written if estimate.length else 0,
            ),
        ]
    )


def _header(estimate: RunEstimate) -> str:
    layout, counts = estimate.layout, count_parameters(estimate.config)
    number, size = layout.micro_batches, estimate.config.training.micro_batch_size
    return (
        f"{layout.world_size} {estimate.gpu.name}: {format_layout(layout)}; "
        f"{number} micro-batch{'es' if number > 1 else ''} of size {size} per replica and step\n"
        f"{counts.total:,} parameters, {counts.non_embedding:,} without embeddings; "
        f"padded vocabulary size {estimate.config.padded_vocab_size:,}"
    )


def format_layout(layout: ParallelLayout) -> str:
    """Format a layout as ``TP 4 x PP 16 x DP 8``."""
    parts = [f"TP {layout.tp}", f"PP {layout.pp}"]
    parts += [f"VP {layout.vp}"] if layout.vp > 1 else []
    parts += [f"CP {layout.cp}"] if layout.cp > 1 else []
    return " x ".join([*parts, f"DP {layout.dp}"])


def format_rank_placement(layout: ParallelLayout, per_node: int, parameters: Sequence[int]) -> str:
    """Format a table with the layers, parameters, ranks and nodes of each pipeline stage."""
    rows = [("stage", "layers", "parameters", "ranks", "nodes and their replicas")]
    for stage, chunks in enumerate(layout.stages):
        first, last = _ranks(layout, stage)
        layers, nodes = " ".join(map(_chunk, chunks)), _nodes(layout, stage, per_node)
        rows.append((str(stage), layers, f"{parameters[stage]:,}", _range(first, last), nodes))
    group = layout.tp * layout.cp
    kinds = f"TP {layout.tp}" + (f" x CP {layout.cp}" if layout.cp > 1 else "")
    gpus = f"{group} adjacent GPUs ({kinds})" if group > 1 else "1 GPU"
    notes = [f"one replica of a stage uses {gpus}; parameters are per GPU"]
    notes += ["E: embedding, L: output layer and loss"]
    if group > per_node:
        notes += ["tensor-parallel groups span nodes: they communicate over the network"]
    return "\n".join([format_table(rows, right=(2,)), *notes])


def _ranks(layout: ParallelLayout, stage: int) -> tuple[int, int]:
    """Return the first and the last rank of a stage."""
    last = layout.rank(layout.tp - 1, layout.cp - 1, layout.dp - 1, stage)
    return layout.rank(0, 0, 0, stage), last


def _nodes(layout: ParallelLayout, stage: int, per_node: int) -> str:
    """Format ``n0 d0-1  n1 d2-3``: two nodes with two replicas each; ``n0:4-7`` is half a node."""
    first, last = _ranks(layout, stage)
    cells = []
    for node in range(first // per_node, last // per_node + 1):
        start, end = max(first, node * per_node), min(last, (node + 1) * per_node - 1)
        gpus = f":{_range(start % per_node, end % per_node)}" if end - start + 1 < per_node else ""
        replicas = ((rank // (layout.tp * layout.cp)) % layout.dp for rank in (start, end))
        cells.append(f"n{node}{gpus} d{_range(*replicas)}")
    return "  ".join(cells if len(cells) <= SHOWN_NODES else [*cells[:2], "...", cells[-1]])


def _chunk(chunk: ModelChunk) -> str:
    layers = _range(chunk.first_layer + 1, chunk.first_layer + chunk.layers)
    parts = [*(["E"] if chunk.embedding else []), layers if chunk.layers else ""]
    return "+".join([part for part in [*parts, "L" if chunk.output else ""] if part]) or "-"


def _memory(estimate: RunEstimate) -> str:
    """Format memory by kind, for the first, the worst and the last stage."""
    stages = sorted({0, estimate.worst_stage, estimate.layout.pp - 1})
    rows = [("memory per GPU", *(f"stage {s}" for s in stages))]
    for kind in RankMemory.__dataclass_fields__:
        rows.append(
            (f"  {kind}", *(format_gigabytes(getattr(estimate.memory[s], kind)) for s in stages))
        )
    rows.append(("  total", *(format_gigabytes(estimate.memory[s].total) for s in stages)))
    most, capacity = estimate.memory[estimate.worst_stage].total, estimate.gpu.memory
    return (
        f"{format_table(rows, right=range(1, len(stages) + 1))}\n"
        f"{'fits' if estimate.fits else 'DOES NOT FIT'}: {most / 1e9:.1f} GB + "
        f"{CUDA_RESERVE / 1e9:.1f} GB for CUDA and NCCL = {estimate.memory_fraction:.0%} of "
        f"{capacity / 1e9:.0f} GB"
    )


def _communication(estimate: RunEstimate) -> str:
    """Format the bytes that a GPU sends, and whether its group fits in one node."""
    layout, per_node = estimate.layout, estimate.gpu.per_node
    spans = {"tensor": layout.tp * layout.cp, "pipeline": layout.world_size}
    stages = sorted({0, layout.pp // 2, layout.pp - 1})
    rows = [("sent per GPU and step", *(f"stage {s}" for s in stages))]
    for kind in CommunicationVolume.__dataclass_fields__:
        sent = [getattr(estimate.communication[s], kind) for s in stages]
        ranks = layout.world_size if kind == "embedding" else layout.tp * layout.cp * layout.dp
        where = "within a node" if spans.get(kind, ranks) <= per_node else "network"
        if any(sent):
            rows.append((f"  {kind} ({where})", *map(format_gigabytes, sent)))
    if len(rows) == 1:
        return "no communication on one GPU"
    return format_table(rows, right=range(1, len(stages) + 1))


def _duration(estimate: RunEstimate, mfu: float, name: str | None) -> str:
    config, batch = estimate.config, estimate.config.training.global_batch_size
    tokens, steps = batch * config.data.seq_length, SECONDS_PER_DAY / estimate.step_seconds
    flops = format_count(step_flops(config, batch))
    rows = [
        (
            "step",
            f"{tokens:,} tokens, {flops[:-1]} {flops[-1]}FLOPs, pipeline bubble "
            f"{estimate.layout.bubble:.1%}",
        ),
        (
            f"at {mfu:.0%} MFU",
            f"{estimate.step_seconds:.2f} s per step; per day {steps:,.0f} steps and "
            f"{format_count(steps * tokens)} tokens",
        ),
        ("run", _length(estimate)),
        ("checkpoints", _checkpoints(estimate)),
        ("each rank saves", _saved_by_rank(estimate)),
    ]
    if name in PUBLISHED_FIGURES:
        rows.append(("published", _published(PUBLISHED_FIGURES[name], config)))
    return format_table(rows, right=())


def _length(estimate: RunEstimate) -> str:
    length, config, seconds = estimate.length, estimate.config, estimate.seconds
    if length is None or seconds is None:
        return "unknown length: set --train-iters or --fold-file"
    tokens = length.samples * config.data.seq_length
    return (
        f"{length.iterations:,} steps ({length.source}), {format_count(tokens)} tokens: "
        f"{seconds / SECONDS_PER_DAY:,.1f} days"
    )


def _checkpoints(estimate: RunEstimate) -> str:
    size = checkpoint_bytes(estimate.config)
    if estimate.length is None:
        return f"{format_bytes(size)} each"
    found = _count_checkpoints(estimate)
    if found.written == 1:
        return f"1 x {format_bytes(size)}, at the end"
    others = ", and up to 2 others during the run" if found.kept < found.written else ""
    return (
        f"{found.written:,} x {format_bytes(size)} written, {found.kept:,} kept "
        f"({format_bytes(found.kept * size)}){others}"
    )


def _count_checkpoints(estimate: RunEstimate) -> CheckpointCounts:
    length = estimate.length
    assert length is not None
    config, seconds = estimate.config, estimate.step_seconds
    return count_checkpoints(config, length.iterations, length.fold_ends, seconds)


def _saved_by_rank(estimate: RunEstimate) -> str:
    config, layout, per_node = estimate.config, estimate.layout, estimate.gpu.per_node
    size = rank_save_bytes(config, layout, max(estimate.parameters))
    if not config.checkpoint.async_save:
        return f"{format_bytes(size)}, through page-locked buffers of its two largest tensors"
    node = format_bytes(size * min(per_node, layout.world_size))
    return f"{format_bytes(size)}, from a copy in page-locked memory ({node} per node)"


def _published(figure: PublishedFigure, config: Config) -> str:
    batch = config.training.global_batch_size
    if figure.per_day_on is None:
        return (
            f"{figure.text}: {format_count(figure.steps * batch * config.data.seq_length)} tokens"
        )
    gpu, number = figure.per_day_on
    speed = tflops_per_device(config, batch * figure.steps, SECONDS_PER_DAY, number)
    peak = peak_tflops(gpu, "bf16")
    return f"{figure.text}: {speed / peak:.0%} MFU" if peak else figure.text


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
