"""Rules that cross sections. All that are broken are told at once, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError


def check(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run on ``world_size`` processes.

    Raises:
        UserError: one line for each broken rule.
    """
    problems = [*_layout(config, world_size), *_model(config), *_features(config), *_times(config)]
    if problems:
        raise UserError("\n".join(problems))


def data_parallel_size(config: Config, world_size: int) -> int:
    """Copies of the model: what TP x CP x PP leave of the world."""
    return world_size // config.parallel.model_parallel_size


def _divisors(number: int, limit: int = 64) -> str:
    return ", ".join(str(d) for d in range(1, min(number, limit) + 1) if number % d == 0)


def _layout(config: Config, world_size: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    size = parallel.model_parallel_size
    if world_size % size:
        yield (
            f"{world_size} processes cannot hold tensor {parallel.tensor_model_parallel_size} x "
            f"pipeline {parallel.pipeline_model_parallel_size} x context "
            f"{parallel.context_parallel_size} = {size} processes per copy of the model: start a "
            f"multiple of {size} processes, or choose sizes whose product is one of "
            f"{_divisors(world_size)}"
        )
        return
    per_step = training.micro_batch_size * (world_size // size)
    if training.global_batch_size % per_step:
        yield (
            f"global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x data-parallel size {world_size // size} = {per_step}: "
            f"try {max(1, training.global_batch_size // per_step) * per_step}"
        )
    micro_batches = training.global_batch_size // per_step
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size and micro_batches % stages:
        yield (
            f"the interleaved schedule needs a number of micro-batches ({micro_batches}) that is a "
            f"multiple of pipeline_model_parallel_size {stages}: change global_batch_size or "
            "micro_batch_size"
        )


def _model(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor_model_parallel_size
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"hidden_size {model.hidden_size} does not divide by num_attention_heads "
            f"{model.num_attention_heads}: change one of them, or give kv_channels"
        )
    if model.num_attention_heads % model.query_groups:
        yield (
            f"num_attention_heads {model.num_attention_heads} does not divide by num_query_groups "
            f"{model.query_groups}: possible groups are {_divisors(model.num_attention_heads)}"
        )
    for name, number in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.query_groups),
        ("ffn_hidden_size", model.ffn_size),
    ):
        if number % tensor:
            yield (
                f"tensor_model_parallel_size {tensor} does not divide {name} {number}: "
                f"possible are {_divisors(number)}"
            )
    if model.padded_vocab_size is not None and model.padded_vocab_size % tensor:
        yield (
            f"tensor_model_parallel_size {tensor} does not divide padded_vocab_size "
            f"{model.padded_vocab_size}: choose one that does, or have the vocabulary padded anew "
            "with --override-resume padded_vocab_size"
        )
    if (
        model.padded_vocab_size is not None
        and model.vocab_size is not None
        and model.padded_vocab_size < model.vocab_size
    ):
        yield (
            f"padded_vocab_size {model.padded_vocab_size} is below vocab_size {model.vocab_size}: "
            "leave it out to have it computed"
        )
    chunks = parallel.pipeline_model_parallel_size * (
        parallel.virtual_pipeline_model_parallel_size or 1
    )
    if model.num_layers % chunks:
        yield (
            f"num_layers {model.num_layers} does not divide into {chunks} pipeline chunks: "
            f"possible are {_divisors(model.num_layers)}"
        )
    if model.activation_function == "swiglu" and model.add_bias_linear:
        yield "swiglu with add_bias_linear is not supported: set add_bias_linear to false"
    if config.data.seq_length > config.positions:
        yield (
            f"seq_length {config.data.seq_length} exceeds max_position_embeddings "
            f"{config.positions}: shorten the sequence or enlarge the model's positions"
        )


def _features(config: Config) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if parallel.sequence_parallel and config.data.seq_length % tensor:
        yield (
            f"sequence_parallel splits seq_length {config.data.seq_length} over tensor parallel "
            f"size {tensor}, which does not divide it"
        )
    if parallel.virtual_pipeline_model_parallel_size and stages < 2:
        yield "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of 2 or more"
    if parallel.context_parallel_size > 1:
        # Transformer Engine's attention could, but batches are not split along the sequence.
        yield (
            f"context_parallel_size {parallel.context_parallel_size} is not supported: it needs "
            "Transformer Engine and batches that are split along the sequence; use 1, with "
            "sequence_parallel or recompute_granularity for long sequences"
        )
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield "overlap_param_gather needs use_distributed_optimizer"
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield "overlap_param_gather needs overlap_grad_reduce"
    if parallel.recompute_granularity == "full" and parallel.recompute_method is None:
        yield "recompute_granularity full needs recompute_method uniform or block"
    if parallel.recompute_method and parallel.recompute_granularity != "full":
        yield "recompute_method is for recompute_granularity full"
    if training.bf16 and training.fp16:
        yield "bf16 and fp16 exclude each other"


def _times(config: Config) -> Iterator[str]:
    training, optimizer = config.training, config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield f"min_lr {optimizer.min_lr} is above lr {optimizer.lr}"
    end = optimizer.lr_decay_iters or training.train_iters
    if end is not None and optimizer.lr_warmup_iters >= end:
        yield (
            f"lr_warmup_iters {optimizer.lr_warmup_iters} leaves nothing of the {end} iterations "
            "of the learning-rate schedule: shorten the warm-up"
        )
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters is None:
        yield "lr_decay_style WSD needs lr_wsd_decay_iters, the length of its tail"
    if config.checkpoint.save is None:
        for name in ("save_interval", "save_interval_tokens", "save_interval_minutes"):
            if getattr(config.checkpoint, name) is not None:
                yield f"{name} needs save, the folder to save in"
    if config.checkpoint.keep_every is not None and config.checkpoint.keep_last is None:
        yield "keep_every says what is kept beside keep_last, which is not given: all are kept"
    if config.faults.exit_interval is not None and config.checkpoint.save is None:
        yield "exit_interval saves before it stops: give save, the folder to save in"
