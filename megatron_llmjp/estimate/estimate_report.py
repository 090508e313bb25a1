"""Text report of a run's estimate."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.checkpoints import (
    CheckpointCounts,
    checkpoint_bytes,
    count_checkpoints,
)
from megatron_llmjp.estimate.communication import CommunicationVolume
from megatron_llmjp.estimate.expert_report import UNMEASURED, format_experts
from megatron_llmjp.estimate.failure_report import format_failures
from megatron_llmjp.estimate.flops import step_flops, tflops_per_device
from megatron_llmjp.estimate.layout_report import format_layout, format_rank_placement
from megatron_llmjp.estimate.memory import RankMemory
from megatron_llmjp.estimate.run_estimate import CUDA_RESERVE, RunEstimate
from megatron_llmjp.estimate.speed.gpus import peak_tflops
from megatron_llmjp.estimate.speed.measured_runs import correction, format_compared
from megatron_llmjp.estimate.speed.step_time import TERMS
from megatron_llmjp.formatting import format_bytes, format_count, format_gigabytes, format_table

SECONDS_PER_DAY = 86400.0
FITTED_GPUS = ("A100", "H100")
"""GPU types of the published runs that the step-time model is fitted to."""


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


def format_estimate(estimate: RunEstimate, name: str | None = None) -> str:
    """Format the whole report, without warnings."""
    return "\n\n".join(
        [
            _header(estimate),
            format_rank_placement(estimate.layout, estimate.gpu.per_node, estimate.parameters),
            _memory(estimate),
            *([format_experts(estimate)] if estimate.config.model.has_experts else []),
            _communication(estimate),
            *([_step_terms(estimate)] if estimate.step_time else []),
            *map(format_compared, estimate.measured_runs),
            _duration(estimate, name),
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
        f"{_unestimated_modules(estimate)}"
    )


def _unestimated_modules(estimate: RunEstimate) -> str:
    modules = [
        m for m in estimate.config.parallel.recompute_modules if m not in ("core_attn", "moe")
    ]
    if not modules:
        return ""
    names = " ".join(modules)
    return f"\nrecompute_modules {names}: not estimated; less memory is used, and more time"


def _communication(estimate: RunEstimate) -> str:
    """Format the bytes that a GPU sends, and whether its group fits in one node."""
    layout, per_node = estimate.layout, estimate.gpu.per_node
    spans = {
        "tensor": layout.tp * layout.cp,
        "pipeline": layout.world_size,
        "experts": layout.ep * layout.etp,
    }
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


def _step_terms(estimate: RunEstimate) -> str:
    """Format the terms of the step time, largest first, and what the prediction rests on."""
    assert estimate.step_time is not None
    total = estimate.step_seconds
    terms = [(TERMS[name], seconds) for name, seconds in estimate.step_time.sorted_terms()]
    rows = [("predicted seconds per step", f"{total:,.3f}", "100.0%")]
    rows += [(f"  {name}", f"{seconds:,.3f}", f"{seconds / total:.1%}") for name, seconds in terms]
    runs = estimate.measured_runs
    notes = [_accuracy(estimate)]
    if runs:
        notes.append(f"times {correction(runs):.3f}, the measured by the predicted time of:")
    elif not estimate.gpu.name.startswith(FITTED_GPUS):
        notes.append(f"no run on {estimate.gpu.name} is among them: the error may be larger")
    return "\n".join([format_table(rows, right=(1, 2)), *notes])


def _accuracy(estimate: RunEstimate) -> str:
    """Format what is known about the error of the step time."""
    runs, found = estimate.measured_runs, estimate.accuracy
    if found is None:
        return UNMEASURED
    low, high = (estimate.step_seconds * factor for factor in estimate.error_range)
    corrected = f" and corrected by {'another' if len(runs) == 1 else 'others'} of its group"
    return (
        f"{low:,.2f} to {high:,.2f} s include 80% of {found.runs} published runs on "
        f"{' and '.join(FITTED_GPUS)}, each predicted from the others{corrected if runs else ''} "
        f"(median error {found.median:.1%})"
    )


def _duration(estimate: RunEstimate, name: str | None) -> str:
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
            f"at {estimate.mfu:.0%} MFU",
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
    low, high = (seconds * factor / SECONDS_PER_DAY for factor in estimate.error_range)
    spread = f" ({low:,.1f} to {high:,.1f})" if low < high else ""
    return (
        f"{length.iterations:,} steps ({length.source}), {format_count(tokens)} tokens: "
        f"{seconds / SECONDS_PER_DAY:,.1f} days{spread}"
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
    size = estimate.saved_bytes
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
