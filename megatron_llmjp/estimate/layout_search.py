"""Search over parallel layouts: those that fit into memory, ranked by predicted step time.

Memory is predicted closely enough to decide whether a layout fits (``memory.py``). The step time is
that of ``step_time.py``, also at a given ``--mfu``, which would be the same for all layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.layout_report import format_layout
from megatron_llmjp.estimate.run_estimate import RunEstimate, estimate_run
from megatron_llmjp.formatting import format_table

MICRO_BATCH_SIZES = (1, 2, 4, 8)
"""Searched sizes."""
VIRTUAL_SIZES = (None, 2, 3, 4, 5, 6)
"""Searched model chunks per stage; None: no interleaving."""
NO_RECOMPUTE: dict[str, object] = {
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
}
FULL_RECOMPUTE: dict[str, object] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BLOCK_SHARES = (0.25, 0.5, 0.75)
"""Searched fractions of the layers of a model chunk that are recomputed."""
UNEVEN_STAGES = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""Fields that count embedding and output layer as one layer each when layers are split."""
MAX_MEMORY_FRACTION = 0.95
"""Fraction of GPU memory that a suggested layout may use: predictions are off by up to 5 %."""
SHOWN = 6
"""Layouts in the table."""
TIME_COLUMNS = {
    "compute": ("products", "attention", "element_wise", "recompute", "output", "kernels"),
    "bubble": ("bubble",),
    "TP comm": ("tensor", "context"),
    "PP comm": ("pipeline",),
    "DP comm": ("data", "stragglers"),
    "optimizer": ("optimizer",),
}
"""Terms of the step time in each column."""
MIN_SHOWN_DIFFERENCE = 0.005
"""Fraction of the step time above which a difference is reported."""


@dataclass(frozen=True)
class LayoutCandidate:
    """Layout that fits into memory, with its estimated step time."""

    estimate: RunEstimate
    given: bool
    """Whether it is the layout of the given configuration."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.estimate.step_seconds

    @property
    def columns(self) -> dict[str, float]:
        """Seconds of a step by column of the table."""
        time = self.estimate.step_time
        return {
            column: sum(getattr(time, term) for term in terms)
            for column, terms in TIME_COLUMNS.items()
        }


def search_layouts(config: Config, machine: PlannedMachine) -> list[LayoutCandidate]:
    """Return all layouts that fit, fastest first, including the given one if it fits."""
    own = _key(config)
    # The padded vocabulary size depends on the tensor-parallel size.
    config = replace_fields(config, padded_vocab_size=None)
    machine = replace(machine, mfu=None)
    found: list[LayoutCandidate] = []
    for candidate in [config, *_candidates(config, machine)]:
        try:
            check_config(candidate, machine.world_size)
            estimate = estimate_run(candidate, machine)
        except UserError:
            continue
        given = _key(candidate) == own
        if given and any(other.given for other in found):
            continue
        if estimate.memory_fraction <= (1.0 if given else MAX_MEMORY_FRACTION):
            found.append(LayoutCandidate(estimate, given))
    return sorted(found, key=lambda candidate: candidate.seconds)


def has_divisible_layout(config: Config, machine: PlannedMachine) -> bool:
    """Return whether any searched layout divides GPUs, layers and batch, fitting or not."""
    return next(_candidates(config, machine), None) is not None


def _key(config: Config) -> tuple[object, ...]:
    parallel = config.parallel
    full = parallel.recompute_granularity == "full"
    block = parallel.recompute_num_layers if parallel.recompute_method == "block" else None
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        config.training.micro_batch_size,
        full,
        block if full else None,
        any(getattr(parallel, name) for name in UNEVEN_STAGES),
    )


def _candidates(config: Config, machine: PlannedMachine) -> Iterator[Config]:
    """Generate layouts of even stages, or else of stages that embedding and loss make even."""
    tensor = [t for t in (1, 2, 4, 8) if t <= machine.gpus_per_node]
    layers = config.model.num_layers
    for t, p, v in product(tensor, range(1, layers + 3), VIRTUAL_SIZES):
        chunks, uneven = p * (v or 1), 0
        if layers % chunks:
            uneven = 2
        if (layers + uneven) % chunks or (p == 1 and v is not None):
            continue
        replicas, rest = divmod(machine.world_size, t * p)
        if rest or replicas == 0:
            continue
        for b, recompute in product(
            MICRO_BATCH_SIZES, _recomputations((layers + uneven) // chunks)
        ):
            if config.training.global_batch_size % (replicas * b):
                continue
            yield replace_fields(
                config,
                tensor_model_parallel_size=t,
                sequence_parallel=t > 1,
                pipeline_model_parallel_size=p,
                virtual_pipeline_model_parallel_size=v,
                use_distributed_optimizer=True,
                micro_batch_size=b,
                **dict.fromkeys(UNEVEN_STAGES, uneven > 0),
                **recompute,
            )


def _recomputations(layers: int) -> list[dict[str, object]]:
    """Return the searched recomputations of chunks of so many layers."""
    numbers = {int(share * layers) for share in BLOCK_SHARES} - {0}
    blocks = [
        {**FULL_RECOMPUTE, "recompute_method": "block", "recompute_num_layers": number}
        for number in sorted(numbers)
    ]
    return [NO_RECOMPUTE, *blocks, FULL_RECOMPUTE]


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
    shown = _best_of_each(found)[:SHOWN]
    shown += [given] if given and given not in shown else []
    columns = (
        "layout",
        "micro-batch",
        "recompute",
        "memory",
        "MFU",
        "step",
        *TIME_COLUMNS,
    )
    rows = [columns, *(_row(s) for s in shown)]
    return "\n".join(
        [
            f"{head}{len(found)} layouts fit; the fastest of each TP and PP, in estimated seconds",
            format_table(rows, right=(1, *range(3, len(columns)))),
            _compare_given(found, given),
            f"flags of the fastest: {layout_flags(found[0].estimate.config)}",
        ]
    )


def _row(candidate: LayoutCandidate) -> tuple[str, ...]:
    estimate = candidate.estimate
    return (
        format_layout(estimate.layout) + (" (given)" if candidate.given else ""),
        str(estimate.config.training.micro_batch_size),
        _recompute(estimate.config),
        f"{estimate.memory_fraction:.0%}",
        f"{estimate.mfu:.0%}",
        f"{candidate.seconds:.2f}",
        *(_seconds(seconds) for seconds in candidate.columns.values()),
    )


def _recompute(config: Config) -> str:
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        return ""
    if parallel.recompute_method == "block":
        return f"{parallel.recompute_num_layers} per chunk"
    return "all layers"


def _seconds(number: float) -> str:
    return f"{number:.2f}" if number else ""


def _best_of_each(found: list[LayoutCandidate]) -> list[LayoutCandidate]:
    """Return the fastest candidate of each combination of tensor and pipeline size."""
    best: dict[tuple[int, int], LayoutCandidate] = {}
    for candidate in found:
        layout = candidate.estimate.layout
        best.setdefault((layout.tp, layout.pp), candidate)
    return list(best.values())


def _compare_given(found: list[LayoutCandidate], given: LayoutCandidate | None) -> str:
    """Format how the given layout compares with the fastest."""
    if given is None:
        return "the given layout is invalid or does not fit"
    rank = found.index(given) + 1
    if rank == 1:
        return "the given layout fits and is the fastest by this estimate"
    return (
        f"the given layout fits and is number {rank} of {len(found)}; the fastest takes "
        f"{1 - found[0].seconds / given.seconds:.0%} less time: {_reasons(found[0], given)}"
    )


def _reasons(best: LayoutCandidate, given: LayoutCandidate) -> str:
    """List the activities in which one layout is faster than another."""
    parts = []
    for column, seconds in given.columns.items():
        saved = seconds - best.columns[column]
        if abs(saved) >= MIN_SHOWN_DIFFERENCE * given.seconds:
            parts.append((saved, f"{column} {abs(saved):.2f} s {'less' if saved > 0 else 'more'}"))
    return ", ".join(text for _, text in sorted(parts, reverse=True))


def layout_flags(config: Config) -> str:
    """Return the flags that select this layout, to be added to the same preset."""
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
    for name in UNEVEN_STAGES:
        if getattr(parallel, name):
            words.append(f"--{name.replace('_', '-')}")
    if parallel.recompute_granularity == "full":
        words.append(
            f"--recompute-granularity full --recompute-method {parallel.recompute_method} "
            f"--recompute-num-layers {parallel.recompute_num_layers}"
        )
    return " ".join(words)
