"""Rules of the layout: processes, batches, pipeline stages, and what is split over them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from megatron_llmjp.config.pipeline_layout import expand_pipeline_layout
from megatron_llmjp.config.schema import Config


def layout_rules(config: Config, world_size: int) -> Iterator[str]:
    """One line for each broken rule."""
    parallel = config.parallel
    size = parallel.model_parallel_size
    if world_size % size:
        yield (
            f"{world_size} processes cannot hold tensor {parallel.tensor_model_parallel_size} x "
            f"pipeline {parallel.pipeline_model_parallel_size} x context "
            f"{parallel.context_parallel_size} = {size} processes per copy of the model: start a "
            f"multiple of {size} processes, or choose sizes whose product is one of "
            f"{divisors(world_size)}"
        )
    else:
        yield from _batches(config, world_size // size)
    yield from _tensor(config)
    yield from _pipeline(config)
    yield from _features(config)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Copies of the model: what TP x CP x PP leave of the world."""
    return world_size // config.parallel.model_parallel_size


def divisors(number: int, limit: int = 64) -> str:
    """The divisors of a number up to ``limit``, to choose from."""
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
            f"the interleaved schedule needs a number of micro-batches ({micro_batches}) that is a "
            f"multiple of pipeline_model_parallel_size {stages}: change global_batch_size or "
            "micro_batch_size"
        )


def _ramp(config: Config, per_step: int) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    assert training.rampup_batch_size is not None
    start, increment, _ = training.rampup_batch_size
    # The interleaved schedule takes its micro-batches in groups of one per stage.
    grouped = parallel.virtual_pipeline_model_parallel_size is not None
    unit = per_step * (parallel.pipeline_model_parallel_size if grouped else 1)
    for what, size in (("start", start), ("increment", increment)):
        if size % unit:
            yield (
                f"rampup_batch_size: its {what} {size} is not a multiple of {unit}, the samples "
                f"that all processes take at once: try {-(size // -unit) * unit}"
            )
    if start > training.global_batch_size or (training.global_batch_size - start) % increment:
        yield (
            f"rampup_batch_size: steps of {increment} from {start} do not meet global_batch_size "
            f"{training.global_batch_size}: choose an increment that divides "
            f"{training.global_batch_size - start}"
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
                f"tensor_model_parallel_size {tensor} does not divide {name} {number}: "
                f"possible are {divisors(number)}"
            )
    if config.parallel.sequence_parallel and config.data.seq_length % tensor:
        yield (
            f"sequence_parallel splits seq_length {config.data.seq_length} over tensor parallel "
            f"size {tensor}, which does not divide it"
        )


def _pipeline(config: Config) -> Iterator[str]:
    """Stages of layers: even, uneven at the ends, or spelled out; as megatron-core demands."""
    parallel = config.parallel
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
            "stages are divided in one way only: by decoder_first/last_pipeline_num_layers, by "
            "account_for_embedding/loss_in_pipeline_split, or by pipeline_model_parallel_layout"
        )
    elif parallel.pipeline_model_parallel_layout is not None:
        yield from _spelled_out(config, parallel.pipeline_model_parallel_layout)
    elif uneven:
        yield from _uneven(config, first, last)
    else:
        yield from _even(config, counted)


def _even(config: Config, counted: int) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers + counted
    chunks = parallel.pipeline_model_parallel_size * (
        parallel.virtual_pipeline_model_parallel_size or 1
    )
    if layers % chunks:
        with_ends = f", and {counted} for embedding and loss," if counted else ""
        yield (
            f"num_layers {config.model.num_layers}{with_ends} does not divide into {chunks} "
            f"pipeline chunks: possible are {divisors(layers)}; or make the first or last stage "
            "smaller with decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers"
        )


def _uneven(config: Config, first: int | None, last: int | None) -> Iterator[str]:
    parallel = config.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    given = [n for n in (first, last) if n is not None]
    stages = parallel.pipeline_model_parallel_size - len(given)
    layers = config.model.num_layers - sum(given)
    if stages < 0 or (stages == 0) != (layers == 0) or layers < 0:
        yield (
            f"{' and '.join(map(str, given))} layers at the ends leave {layers} layers for "
            f"{stages} stages between: change decoder_first_pipeline_num_layers, "
            "decoder_last_pipeline_num_layers or pipeline_model_parallel_size"
        )
        return
    if stages and layers % (stages * chunks):
        yield (
            f"the {layers} layers between the first and last stage do not divide into "
            f"{stages * chunks} pipeline chunks: leave a multiple of {stages * chunks}"
        )
    if any(n % chunks for n in given):
        yield (
            f"the layers of the first and last stage ({', '.join(map(str, given))}) must be "
            f"multiples of virtual_pipeline_model_parallel_size {chunks}"
        )


def _spelled_out(config: Config, text: str) -> Iterator[str]:
    """Rules of ``pipeline_model_parallel_layout``."""
    parallel, name = config.parallel, "pipeline_model_parallel_layout"
    plain = expand_pipeline_layout(text)
    if unknown := set(plain) - set("EtL|"):
        yield (
            f"{name} '{text}': '{min(unknown)}' is unknown; E is the embedding, t a layer, L the "
            "loss, | separates stages, and x*3 or (xy)*3 repeats"
        )
        return
    whole = plain.replace("|", "")
    if whole[:1] != "E" or whole[-1:] != "L" or whole.count("E") != 1 or whole.count("L") != 1:
        yield f"{name} '{text}': it must begin with E, end with L, and hold each once"
    if whole.count("t") != config.model.num_layers:
        yield (
            f"{name} '{text}': it has {whole.count('t')} layers (t), the model "
            f"{config.model.num_layers}"
        )
    stages, found = parallel.pipeline_model_parallel_size, plain.count("|") + 1
    if found != stages * (parallel.virtual_pipeline_model_parallel_size or 1):
        rest = found % stages
        yield f"{name} '{text}': it has {found} stages for {stages} processes: " + (
            f"make it a multiple of {stages}"
            if rest
            else f"give virtual_pipeline_model_parallel_size {found // stages}"
            if found > stages
            else "leave virtual_pipeline_model_parallel_size out"
        )


def _features(config: Config) -> Iterator[str]:
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size and stages < 2:
        yield "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of 2 or more"
    if parallel.context_parallel_size > 1:
        yield from _context_parallel(config)
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield "overlap_param_gather needs use_distributed_optimizer"
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield "overlap_param_gather needs overlap_grad_reduce"
    yield from _recompute(config)


def _context_parallel(config: Config) -> Iterator[str]:
    size, data = config.parallel.context_parallel_size, config.data
    if find_spec("transformer_engine") is None:
        yield (
            f"context_parallel_size {size} is not supported here: it needs Transformer Engine, "
            "whose attention spans processes; install it, or use 1, with sequence_parallel or "
            "recompute_granularity for long sequences"
        )
    pieces = 2 * size * config.parallel.tensor_model_parallel_size
    if data.seq_length % pieces:
        yield (
            f"context_parallel_size {size} cuts seq_length {data.seq_length} into {pieces} parts "
            f"(2 per process, times tensor parallel size): choose a multiple of {pieces}"
        )
    if data.reset_attention_mask or data.eod_mask_loss:
        # Parts of a sequence with different numbers of tokens would weigh the same.
        yield (
            "context_parallel_size above 1 goes without reset_attention_mask and eod_mask_loss: "
            "its ranks hold parts of documents, whose losses would not be weighted right"
        )


def _recompute(config: Config) -> Iterator[str]:
    parallel = config.parallel
    full = parallel.recompute_granularity == "full"
    if full and parallel.recompute_method is None:
        yield "recompute_granularity full needs recompute_method uniform or block"
    if full and parallel.recompute_num_layers is None:
        yield (
            "recompute_granularity full needs recompute_num_layers: 1 recomputes from every "
            "layer (uniform), or as many layers of each stage (block)"
        )
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(parallel, name) is not None and not full:
            yield f"{name} is for recompute_granularity full"
    layers = config.model.num_layers // parallel.pipeline_model_parallel_size
    if full and (parallel.recompute_num_layers or 0) > max(1, layers):
        yield (
            f"recompute_num_layers {parallel.recompute_num_layers} exceeds the {layers} layers of "
            "a pipeline stage"
        )
