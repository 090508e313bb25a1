"""Table of suggested layouts, with the rank of the given one and the flags of the fastest."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.expert_report import UNMEASURED
from megatron_llmjp.estimate.layout_report import format_layout
from megatron_llmjp.estimate.search.layout_candidates import (
    COUNTED_LAYERS,
    NO_LAYOUT,
    NO_RECOMPUTE,
)
from megatron_llmjp.estimate.search.layout_search import MAX_MEMORY_FRACTION, LayoutCandidate
from megatron_llmjp.formatting import format_table

SHOWN = 6
"""Layouts in the table."""
FURTHER_FIELDS = (
    "context_parallel_size",
    "virtual_pipeline_model_parallel_size",
    *COUNTED_LAYERS[0],
    *NO_LAYOUT,
    *NO_RECOMPUTE,
)
"""Fields of a layout whose flags are printed only if needed."""
TIME_COLUMNS = {
    "compute": (
        "products",
        "attention",
        "element_wise",
        "expert_products",
        "permutation",
        "recompute",
        "output",
        "kernels",
    ),
    "bubble": ("bubble",),
    "TP comm": ("tensor", "context"),
    "EP comm": ("experts",),
    "PP comm": ("pipeline",),
    "DP comm": ("data", "stragglers"),
    "optimizer": ("optimizer",),
}
"""Terms of the step time in each column; that of experts is omitted for dense models."""
MIN_SHOWN_DIFFERENCE = 0.005
"""Fraction of the step time above which a difference is reported."""


def format_candidates(config: Config, machine: PlannedMachine, found: list[LayoutCandidate]) -> str:
    """Format the best layouts, their step times by activity, and the rank of the given layout."""
    gpu = machine.gpu
    if machine.gpu_memory:
        gpu += f" with {machine.gpu_memory / 1e9:.0f} GB"
    head = (
        f"{machine.world_size} {gpu}, global batch {config.training.global_batch_size}, "
        f"{config.data.seq_length} tokens: "
    )
    if not found:
        return head + "no layout fits: use more GPUs, or GPUs with more memory"
    given = next((s for s in found if s.given), None)
    sizes = "TP, PP, CP and EP" if config.model.has_experts else "TP, PP and CP"
    shown = _best_of_each(found)[:SHOWN]
    shown += [given] if given and given not in shown else []
    times = [name for name in TIME_COLUMNS if name != "EP comm" or config.model.has_experts]
    columns = (
        "layout",
        "micro-batch",
        "recompute",
        "memory",
        "MFU",
        "step",
        *times,
    )
    rows = [columns, *(_row(s, times) for s in shown)]
    return "\n".join(
        [
            f"{head}{len(found)} layouts fit into {MAX_MEMORY_FRACTION:.0%} of the memory, which "
            f"is predicted within 5%; the fastest of each {sizes}, in estimated seconds",
            format_table(rows, right=(1, *range(3, len(columns)))),
            _compare_given(found, given),
            f"flags of the fastest: {layout_flags(found[0].estimate.config, config)}",
            *([UNMEASURED] if config.model.has_experts else []),
        ]
    )


def _row(candidate: LayoutCandidate, times: Sequence[str]) -> tuple[str, ...]:
    estimate = candidate.estimate
    return (
        format_layout(estimate.layout)
        + _options(estimate.config)
        + (" (given)" if candidate.given else ""),
        str(estimate.config.training.micro_batch_size),
        _recompute(estimate.config),
        f"{estimate.memory_fraction:.0%}",
        f"{estimate.mfu:.0%}",
        f"{candidate.seconds:.2f}",
        *(_seconds(_columns(candidate)[name]) for name in times),
    )


def _columns(candidate: LayoutCandidate) -> dict[str, float]:
    """Return the seconds of a step by column."""
    time = candidate.estimate.step_time
    return {
        column: sum(getattr(time, term) for term in terms) for column, terms in TIME_COLUMNS.items()
    }


def _options(config: Config) -> str:
    """Return what is switched off that suggested layouts use by default."""
    parallel = config.parallel
    off = []
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        off.append("no sequence parallelism")
    if not parallel.use_distributed_optimizer:
        off.append("no distributed optimizer")
    return "".join(f", {option}" for option in off)


def _recompute(config: Config) -> str:
    parallel = config.parallel
    if parallel.recompute_granularity == "selective":
        modules = parallel.recompute_modules
        return "attention" if modules == ("core_attn",) else " ".join(modules)
    if parallel.recompute_granularity != "full":
        return ""
    if parallel.recompute_method == "block":
        return f"{parallel.recompute_num_layers} per chunk"
    return "all layers"


def _seconds(number: float) -> str:
    return f"{number:.2f}" if number else ""


def _best_of_each(found: list[LayoutCandidate]) -> list[LayoutCandidate]:
    """Return the fastest candidate of each combination of TP, PP, CP and sizes of experts."""
    best: dict[tuple[int, ...], LayoutCandidate] = {}
    for candidate in found:
        layout = candidate.estimate.layout
        best.setdefault((layout.tp, layout.pp, layout.cp, layout.ep, layout.etp), candidate)
    return list(best.values())


def _compare_given(found: list[LayoutCandidate], given: LayoutCandidate | None) -> str:
    """Format how the given layout compares with the fastest."""
    if given is None:
        return "the given layout is invalid or does not fit"
    rank = found.index(given) + 1
    if rank == 1:
        return "the given layout fits and is the fastest by this estimate"
    saved = 1 - found[0].seconds / given.seconds
    text = f"the given layout fits and is number {rank} of {len(found)}; the fastest takes "
    if saved < MIN_SHOWN_DIFFERENCE:
        return f"{text}less than {MIN_SHOWN_DIFFERENCE:.1%} less time"
    return f"{text}{saved:.0%} less time: {_reasons(found[0], given)}"


def _reasons(best: LayoutCandidate, given: LayoutCandidate) -> str:
    """List the activities in which one layout is faster than another."""
    parts = []
    fastest = _columns(best)
    for column, seconds in _columns(given).items():
        saved = seconds - fastest[column]
        if abs(saved) >= MIN_SHOWN_DIFFERENCE * given.seconds:
            parts.append((saved, f"{column} {abs(saved):.2f} s {'less' if saved > 0 else 'more'}"))
    return ", ".join(text for _, text in sorted(parts, reverse=True))


def layout_flags(config: Config, given: Config) -> str:
    """Return the flags that select a layout, to be added to the given configuration."""
    parallel = config.parallel
    words = [
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}",
        f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}",
        f"--micro-batch-size {config.training.micro_batch_size}",
        f"--{'' if parallel.use_distributed_optimizer else 'no-'}use-distributed-optimizer",
        f"--{'' if parallel.sequence_parallel else 'no-'}sequence-parallel",
    ]
    if config.model.has_experts:
        words.append(f"--expert-model-parallel-size {parallel.expert_model_parallel_size}")
        words.append(f"--expert-tensor-parallel-size {parallel.expert_tensor_size}")
    for name in FURTHER_FIELDS:
        value, default = getattr(parallel, name), type(parallel).model_fields[name].default
        if value != default or value != getattr(given.parallel, name):
            words.append(_flag(name, value))
    if not parallel.use_distributed_optimizer:
        words.append("--no-overlap-param-gather")
    return " ".join(words)


def _flag(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    words = value if isinstance(value, tuple) else ["none" if value is None else value]
    return " ".join([f"--{flag}", *map(str, words)])
