"""Parallel layouts that a search tries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config

TENSOR_SIZES = (1, 2, 4, 8)
MORE_TENSOR_SIZES = (16, 32)
"""Larger than a node of eight GPUs: only tried if no other layout fits."""
CONTEXT_SIZES = (1, 2, 4, 8)
MIN_CONTEXT_TOKENS = 1024
"""Smallest part of a sequence that a context-parallel rank gets."""
MICRO_BATCH_SIZES = (1, 2, 4, 8)
VIRTUAL_SIZES = (None, 2, 3, 4, 5, 6)
"""Model chunks per stage; None: no interleaving."""
NO_RECOMPUTE: dict[str, object] = {
    "recompute_granularity": None,
    "recompute_modules": ("core_attn",),
    "recompute_method": None,
    "recompute_num_layers": None,
}
SELECTIVE_RECOMPUTE: dict[str, object] = {**NO_RECOMPUTE, "recompute_granularity": "selective"}
FULL_RECOMPUTE: dict[str, object] = {
    **NO_RECOMPUTE,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BLOCK_SHARES = (0.25, 0.5, 0.75)
"""Fractions of the layers of a model chunk that are recomputed."""
COUNTED_LAYERS: tuple[dict[str, object], ...] = tuple(
    {
        "account_for_embedding_in_pipeline_split": embedding,
        "account_for_loss_in_pipeline_split": loss,
    }
    for embedding, loss in ((False, False), (False, True), (True, True))
)
"""Embedding and output layer as one layer each when layers are split, none, one or both."""
NO_LAYOUT: dict[str, object] = {
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
}
"""Other splits of the layers, which hold for one pipeline size only."""
SEARCHED = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_size",
    "use_distributed_optimizer",
    *COUNTED_LAYERS[0],
    *NO_LAYOUT,
    *NO_RECOMPUTE,
)
"""Values of the parallel section that differ between candidates, with sequence parallelism."""


def layout_key(config: Config) -> tuple[object, ...]:
    """Return the values in which candidates differ."""
    parallel = config.parallel
    sequence_parallel = parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1
    values = (getattr(parallel, name) for name in SEARCHED)
    return (config.training.micro_batch_size, sequence_parallel, *values)


def candidates(
    config: Config, machine: PlannedMachine, beyond_node: bool = False
) -> Iterator[Config]:
    """Generate layouts that divide GPUs, layers, sequence and batch, whether they fit or not.

    All use sequence parallelism with tensor parallelism, and the distributed optimizer.

    Args:
        config: the run's configuration.
        machine: its GPUs.
        beyond_node: whether tensor-parallel groups are larger than a node, instead of within one.
    """
    for t, p, c in tensor_pipeline_context_sizes(config, machine, beyond_node):
        for v in VIRTUAL_SIZES:
            split = split_fields(config, p, v)
            if split is not None:
                replicas = machine.world_size // (t * p * c)
                yield from layouts_of_sizes(config, replicas, (t, p, c, v), split)


def tensor_pipeline_context_sizes(
    config: Config, machine: PlannedMachine, beyond_node: bool
) -> Iterator[tuple[int, int, int]]:
    """Generate the tensor, pipeline and context parallel sizes that divide GPUs and heads."""
    sizes = sorted({*TENSOR_SIZES, *MORE_TENSOR_SIZES})
    tensor = [t for t in sizes if (t > machine.gpus_per_node) == beyond_node]
    stages, heads = range(1, config.model.num_layers + 3), config.model.num_attention_heads
    for t, p, c in product(tensor, stages, _context_sizes(config)):
        replicas, rest = divmod(machine.world_size, t * p * c)
        if not rest and replicas and heads % t == 0:
            yield t, p, c


def variants(config: Config, copies: int) -> Iterator[Config]:
    """Generate the layout of a candidate with one of the options that seldom make it faster.

    Args:
        config: a candidate.
        copies: number of its data- and context-parallel ranks.
    """
    parallel = config.parallel
    if parallel.recompute_granularity is None:
        yield replace_fields(config, **SELECTIVE_RECOMPUTE)
    if parallel.sequence_parallel and parallel.context_parallel_size == 1:
        yield replace_fields(config, sequence_parallel=False)
    if parallel.use_distributed_optimizer and copies > 1:
        yield replace_fields(config, use_distributed_optimizer=False, overlap_param_gather=False)


def _context_sizes(config: Config) -> list[int]:
    length = config.data.seq_length
    return [c for c in CONTEXT_SIZES if c == 1 or length // c >= MIN_CONTEXT_TOKENS]


def split_fields(config: Config, p: int, v: int | None) -> dict[str, object] | None:
    """Return the fields that make all chunks even, or None if none of them does."""
    if p == 1 and v is not None:
        return None
    chunks = p * (v or 1)
    for counted in COUNTED_LAYERS:
        if (config.model.num_layers + sum(map(bool, counted.values()))) % chunks == 0:
            return counted
    return None


def layouts_of_sizes(
    config: Config,
    replicas: int,
    sizes: tuple[int, int, int, int | None],
    split: dict[str, object],
    pairs: Iterable[tuple[int, dict[str, object]]] | None = None,
) -> Iterator[Config]:
    """Generate the layouts of TP, PP, CP and virtual stages, as far as the batch is divisible.

    Args:
        config: the run's configuration.
        replicas: data-parallel size.
        sizes: TP, PP, CP, and chunks per stage or None.
        split: fields that split the layers evenly.
        pairs: micro-batch sizes with fields of a recomputation; None for all that are searched.
            Context parallelism is for micro-batch 1.
    """
    t, p, c, v = sizes
    if pairs is None:
        layers = -(-config.model.num_layers // (p * (v or 1)))
        pairs = product(MICRO_BATCH_SIZES if c == 1 else (1,), _recomputations(layers))
    for b, recompute in pairs:
        if config.training.global_batch_size % (replicas * b) == 0:
            yield replace_fields(
                config,
                tensor_model_parallel_size=t,
                sequence_parallel=t > 1,
                pipeline_model_parallel_size=p,
                virtual_pipeline_model_parallel_size=v,
                context_parallel_size=c,
                use_distributed_optimizer=True,
                micro_batch_size=b,
                **NO_LAYOUT,
                **split,
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
