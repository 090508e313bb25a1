"""Validation of the parallel layout: processes, batches, pipeline stages, tensor splits."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_llmjp.config.expert_validation import expert_layout_problems
from megatron_llmjp.config.pipeline_layout import expand_pipeline_layout
from megatron_llmjp.config.schema import Config, ParallelConfig


def layout_problems(config: Config, world_size: int) -> Iterator[str]:
    """Yield one line for each violated rule."""
    parallel = config.parallel
    size = parallel.model_parallel_size
    if world_size % size:
        yield (
            f"{world_size} processes are not divisible by tensor "
            f"{parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} "
            f"= {size} processes per model replica: use a multiple of {size} processes, or sizes "
            f"whose product is one of {divisors(world_size)}"
        )
    else:
        yield from _batches(config, world_size // size)
    yield from _tensor(config)
    yield from _context(config)
    yield from pipeline_problems(parallel, config.model.num_layers)
    yield from _features(config)
    yield from expert_layout_problems(config, world_size)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Return the number of model replicas: world size / (TP x CP x PP)."""
    return world_size // config.parallel.model_parallel_size


def divisors(number: int, limit: int = 64) -> str:
    """Return the divisors of a number up to ``limit``, for messages."""
    return ", ".join(str(d) for d in range(1, min(number, limit) + 1) if number % d == 0)


def _batches(config: Config, replicas: int) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    per_step = training.micro_batch_size * replicas
    stages = parallel.pipeline_model_parallel_size
    if training.global_batch_size % per_step:
        yield (
            f"global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x data-parallel size {replicas} = {per_step}: "
            f"try {max(1, training.global_batch_size // per_step) * per_step}"
        )
    elif training.rampup_batch_size is not None:
        yield from _ramp(config, per_step)
    micro_batches = training.global_batch_size // per_step
    if parallel.virtual_pipeline_model_parallel_size and micro_batches % stages:
        yield (
            f"the interleaved schedule requires a number of micro-batches ({micro_batches}) that "
            f"is a multiple of pipeline_model_parallel_size {stages}: change global_batch_size or "
            "micro_batch_size"
        )


def _ramp(config: Config, per_step: int) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    assert training.rampup_batch_size is not None
    start, increment, _ = training.rampup_batch_size
    # The interleaved schedule processes micro-batches in groups of one per stage.
    grouped = parallel.virtual_pipeline_model_parallel_size is not None
    unit = per_step * (parallel.pipeline_model_parallel_size if grouped else 1)
    for what, size in (("start", start), ("increment", increment)):
        if size % unit:
            yield (
                f"rampup_batch_size: its {what} {size} is not a multiple of {unit}, the samples "
                f"that all processes handle at once: try {-(size // -unit) * unit}"
            )
    if start > training.global_batch_size:
        yield (
            f"rampup_batch_size: its start {start} is above global_batch_size "
            f"{training.global_batch_size}: the batch size can only increase"
        )
    elif (training.global_batch_size - start) % increment:
        yield (
            f"rampup_batch_size: increments of {increment} from {start} do not reach "
            f"global_batch_size {training.global_batch_size}: choose an increment that divides "
            f"{training.global_batch_size - start}"
        )


def _context(config: Config) -> Iterator[str]:
    """Rules of context parallelism."""
    model, parts = config.model, 2 * config.parallel.context_parallel_size
    length = model.yarn_original_max_position_embeddings
    if parts > 2 and model.position_embedding_type == "yarn" and length % parts:
        # megatron-core divides a table of this length as it divides sequences.
        yield (
            f"yarn_original_max_position_embeddings {length} is not a multiple of {parts}, twice "
            "context_parallel_size, as megatron-core's YaRN requires"
        )


def _tensor(config: Config) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    for name, number in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.query_groups),
        ("ffn_hidden_size", model.ffn_size),
    ):
        if number % tensor:
            yield (
                f"{name} {number} is not divisible by tensor_model_parallel_size {tensor}: "
                f"possible are {divisors(number)}"
            )
    if config.parallel.sequence_parallel and config.data.seq_length % tensor:
        yield (
            f"seq_length {config.data.seq_length} is not divisible by tensor_model_parallel_size "
            f"{tensor}, as sequence_parallel requires"
        )


def pipeline_problems(parallel: ParallelConfig, num_layers: int) -> Iterator[str]:
    """Yield one line for each violated rule of the pipeline stages.

    They are equal, unequal at the ends, or given as a layout.
    """
    first = parallel.decoder_first_pipeline_num_layers
    last = parallel.decoder_last_pipeline_num_layers
    counted = (
        parallel.account_for_embedding_in_pipeline_split
        + parallel.account_for_loss_in_pipeline_split
    )
    uneven = first is not None or last is not None
    ways = (uneven, counted > 0, parallel.pipeline_model_parallel_layout is not None)
    if sum(ways) > 1:
        yield (
            "pipeline stages can be set in one way only: decoder_first/last_pipeline_num_layers, "
            "account_for_embedding/loss_in_pipeline_split, or pipeline_model_parallel_layout"
        )
    elif parallel.pipeline_model_parallel_layout is not None:
        yield from _layout(parallel, num_layers, parallel.pipeline_model_parallel_layout)
    elif uneven:
        yield from _uneven(parallel, num_layers, first, last)
    else:
        yield from _even(parallel, num_layers, counted)


def _even(parallel: ParallelConfig, num_layers: int, counted: int) -> Iterator[str]:
    layers = num_layers + counted
    chunks = parallel.pipeline_model_parallel_size * (
        parallel.virtual_pipeline_model_parallel_size or 1
    )
    if layers % chunks:
        with_ends = f", and {counted} for embedding and loss," if counted else ""
        yield (
            f"num_layers {num_layers}{with_ends} is not divisible into "
            f"{chunks} pipeline chunks: possible are {divisors(layers)}; or make the first or last "
            "stage smaller with decoder_first_pipeline_num_layers or "
            "decoder_last_pipeline_num_layers"
        )


def _uneven(
    parallel: ParallelConfig, num_layers: int, first: int | None, last: int | None
) -> Iterator[str]:
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    given = [n for n in (first, last) if n is not None]
    stages = parallel.pipeline_model_parallel_size - len(given)
    layers = num_layers - sum(given)
    if stages < 0 or (stages == 0) != (layers == 0) or layers < 0:
        yield (
            f"{' and '.join(map(str, given))} layers at the ends leave {layers} layers for "
            f"{stages} stages in between: change decoder_first_pipeline_num_layers, "
            "decoder_last_pipeline_num_layers or pipeline_model_parallel_size"
        )
        return
    if stages and layers % (stages * chunks):
        yield (
            f"the {layers} layers between the first and last stage are not divisible into "
            f"{stages * chunks} pipeline chunks: they must be a multiple of {stages * chunks}"
        )
    if any(n % chunks for n in given):
        yield (
            f"the layers of the first and last stage ({', '.join(map(str, given))}) must be "
            f"multiples of virtual_pipeline_model_parallel_size {chunks}"
        )


def _layout(parallel: ParallelConfig, num_layers: int, text: str) -> Iterator[str]:
    """Rules of ``pipeline_model_parallel_layout``."""
    name = "pipeline_model_parallel_layout"
    plain = expand_pipeline_layout(text)
    if unknown := set(plain) - set("EtL|"):
        yield (
            f"{name} '{text}': '{min(unknown)}' is unknown; E is the embedding, t a layer, L the "
            "loss, | separates stages, and x*3 or (xy)*3 repeats"
        )
        return
    whole = plain.replace("|", "")
    if whole[:1] != "E" or whole[-1:] != "L" or whole.count("E") != 1 or whole.count("L") != 1:
        yield f"{name} '{text}': it must begin with E, end with L, and contain each once"
    if whole.count("t") != num_layers:
        yield f"{name} '{text}': it has {whole.count('t')} layers (t), the model {num_layers}"
    stages, found = parallel.pipeline_model_parallel_size, plain.count("|") + 1
    if found != stages * (parallel.virtual_pipeline_model_parallel_size or 1):
        rest = found % stages
        yield f"{name} '{text}': it has {found} stages for {stages} processes: " + (
            f"make it a multiple of {stages}"
            if rest
            else f"set virtual_pipeline_model_parallel_size {found // stages}"
            if found > stages
            else "remove virtual_pipeline_model_parallel_size"
        )


def _features(config: Config) -> Iterator[str]:
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size and stages < 2:
        yield "virtual_pipeline_model_parallel_size requires pipeline_model_parallel_size 2 or more"
    if parallel.context_parallel_size > 1:
        yield from _context_parallel(config)
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield "overlap_param_gather requires use_distributed_optimizer"
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield "overlap_param_gather requires overlap_grad_reduce"
    yield from _recompute(config)


def _context_parallel(config: Config) -> Iterator[str]:
    size, length = config.parallel.context_parallel_size, config.data.seq_length
    chunks = 2 * size * config.parallel.tensor_model_parallel_size
    if length % chunks:
        yield (
            f"seq_length {length} is not divisible by {chunks}, which is 2 x "
            f"context_parallel_size {size} x tensor parallel size: use a multiple of {chunks}"
        )


def _recomputed_modules(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    modules = parallel.recompute_modules
    if modules != ("core_attn",) and parallel.recompute_granularity != "selective":
        yield "recompute_modules requires recompute_granularity selective"
    if not modules:
        yield "recompute_modules is empty: omit recompute_granularity to recompute nothing"
    required = {
        "moe": ("num_moe_experts", model.has_experts),
        "moe_act": ("moe_grouped_gemm", parallel.moe_grouped_gemm),
        "shared_experts": (
            "moe_shared_expert_intermediate_size",
            bool(model.moe_shared_expert_intermediate_size),
        ),
    }
    for module in modules:
        field, is_set = required.get(module, ("", True))
        if not is_set:
            yield f"recompute_modules {module} requires {field}"


def _recompute(config: Config) -> Iterator[str]:
    parallel = config.parallel
    full = parallel.recompute_granularity == "full"
    if full and parallel.recompute_method is None:
        yield "recompute_granularity full requires recompute_method uniform or block"
    if full and parallel.recompute_num_layers is None:
        yield (
            "recompute_granularity full requires recompute_num_layers: layers per recomputed unit "
            "(uniform), or recomputed layers per stage (block)"
        )
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(parallel, name) is not None and not full:
            yield f"{name} requires recompute_granularity full"
    yield from _recomputed_modules(config)
    layers = config.model.num_layers // parallel.pipeline_model_parallel_size
    if full and (parallel.recompute_num_layers or 0) > max(1, layers):
        yield (
            f"recompute_num_layers {parallel.recompute_num_layers} exceeds the {layers} layers of "
            "a pipeline stage"
        )
