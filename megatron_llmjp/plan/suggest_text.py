"""Suggested layouts as a table for a terminal, with what to say of the given one."""

from __future__ import annotations

from dataclasses import fields

from megatron_llmjp.config.rehearsal import Rehearsal
from megatron_llmjp.config.schema import Config
from megatron_llmjp.numbers import aligned
from megatron_llmjp.plan.outlook_text import shape
from megatron_llmjp.plan.suggest import Suggestion, Times

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


def show_suggestions(config: Config, rehearsal: Rehearsal, found: list[Suggestion]) -> str:
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
            aligned(rows, right=(1, *range(3, len(columns)))),
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
