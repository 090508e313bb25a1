"""Warnings on valid settings that are known to cause problems.

Each names its source: LLM-jp's published scripts, model cards and reports, or this program's
intended use. A warning never stops a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_llmjp.config.learning_rate_rules import decay_warnings
from megatron_llmjp.config.lr_decay_styles import DECAY_STYLES
from megatron_llmjp.config.parameter_counts import transformer_parameters
from megatron_llmjp.config.pipeline_layout import pipeline_bubble, virtual_pipeline_size
from megatron_llmjp.config.schema import Config

LONG_RUN_ITERATIONS = 1000
"""A run of at least this many iterations is not a test."""
LARGE_MODEL_PARAMETERS = 5e8
"""A model of at least this many parameters is not a test."""


@dataclass(frozen=True)
class RunSize:
    """Quantities of a resolved run, besides its configuration, that warnings depend on."""

    world_size: int
    train_iters: int
    decay_end: int | None
    """Last iteration of the learning-rate decay."""
    validation_sets: int

    @property
    def is_long(self) -> bool:
        """Whether this is more than a test."""
        return self.train_iters >= LONG_RUN_ITERATIONS


def config_warnings(config: Config, size: RunSize) -> list[str]:
    """Return warnings on a resolved configuration, the most expensive mistakes first."""
    return [
        *decay_warnings(config.optimizer, size.decay_end, size.train_iters),
        *(warning for rule in RULES for warning in rule(config, size)),
    ]


def _is_large(config: Config) -> bool:
    """Whether the layers have enough parameters for more than a test."""
    return transformer_parameters(config.model) >= LARGE_MODEL_PARAMETERS


def _epsilon(config: Config, _: RunSize) -> Iterator[str]:
    o = config.optimizer
    if o.optimizer == "adam" and o.adam_eps > 1e-7:
        yield (
            f"adam_eps {o.adam_eps:g}: llm-jp-3-172b alpha1 and alpha2 used 1e-5 and were "
            "abandoned because of it; later models used 1e-8"
        )


def _saves(config: Config, size: RunSize) -> Iterator[str]:
    c = config.checkpoint
    if not size.is_long:
        return
    if c.save is None:
        yield f"save is not set: without it, {size.train_iters:,} iterations write no checkpoint"
    elif not any((c.save_interval, c.save_interval_tokens, c.save_interval_minutes, c.save_policy)):
        if c.non_persistent_save_interval or c.non_persistent_save_minutes:
            lost = "only the newest checkpoint is kept between the ends of folds"
        else:
            lost = "nothing is saved between the ends of folds: a crash loses a whole fold"
        yield f"save_interval is not set, {lost}; llm-jp-3 kept every 1,000 iterations"
    elif c.save_interval is not None and c.save_interval > size.train_iters:
        yield (
            f"save_interval {c.save_interval:,} is longer than the run of "
            f"{size.train_iters:,} iterations: only the end is kept"
        )


def _evaluation(config: Config, size: RunSize) -> Iterator[str]:
    training = config.training
    if not size.is_long:
        return
    if not training.eval_iters or not size.validation_sets:
        reason = "eval_iters is 0" if not training.eval_iters else "there are no validation sets"
        yield (
            f"{reason}: the validation loss is not measured, as in the llm-jp-3 and v4 runs; "
            "define `validation` in the fold file and set eval_iters 10"
        )
    elif training.eval_interval is not None and training.eval_interval > size.train_iters:
        yield (
            f"eval_interval {training.eval_interval:,} is longer than the run of "
            f"{size.train_iters:,} iterations: only the end is validated"
        )


def _precision(config: Config, _: RunSize) -> Iterator[str]:
    training = config.training
    if not _is_large(config) or training.bf16:
        return
    if training.fp16:
        yield (
            "fp16: the loss scale can collapse in a model of this size; all LLM-jp models since "
            "v2.0 used bf16"
        )
    else:
        yield "fp32 requires twice the memory of bf16 and is several times slower on a GPU"


def _rates(config: Config, size: RunSize) -> Iterator[str]:
    o = config.optimizer
    given = (o.lr_warmup_iters, o.lr_warmup_samples, o.lr_warmup_tokens, o.lr_warmup_fraction)
    if size.is_long and o.optimizer == "adam" and not any(given) and not config.checkpoint.finetune:
        yield "no warm-up: Adam's first steps are unstable; LLM-jp's models used 2,000 iterations"
    if size.is_long and o.lr_warmup_iters * 5 > size.train_iters:
        yield (
            f"the warm-up of {o.lr_warmup_iters:,} iterations is more than a fifth of the "
            f"run's {size.train_iters:,}"
        )
    style = DECAY_STYLES[o.lr_decay_style]
    decays = style.decays and not style.has_final_decay
    if decays and o.min_lr > o.lr / 5:
        yield (
            f"min_lr {o.min_lr:g} is more than a fifth of lr {o.lr:g}, so the decay has little "
            "effect; llm-jp-3 and v4 decayed to a tenth"
        )
    if decays and o.min_lr == 0 and size.is_long:
        yield (
            "min_lr 0: the last iterations have no effect, and continued training needs another "
            "warm-up; llm-jp-3 and v4 decayed to a tenth of lr"
        )


def _optimizer(config: Config, size: RunSize) -> Iterator[str]:
    o = config.optimizer
    if not size.is_long:
        return
    if o.optimizer == "adam" and o.adam_beta2 > 0.99:
        yield f"adam_beta2 {o.adam_beta2:g} is Megatron-LM's default; LLM-jp's models used 0.95"
    if o.weight_decay == 0 and not o.end_weight_decay:
        yield "weight_decay is 0; LLM-jp's models used 0.1"
    if o.clip_grad == 0:
        yield "clip_grad is 0: one bad batch can damage the weights; LLM-jp's models used 1.0"


def _model(config: Config, _: RunSize) -> Iterator[str]:
    model, data = config.model, config.data
    if model.normalization == "RMSNorm" and (model.hidden_dropout or model.attention_dropout):
        yield (
            "dropout in a LLaMA model: LLM-jp's models had none since v2.0; Megatron-LM's default "
            "is 0.1: pass --hidden-dropout 0 --attention-dropout 0"
        )
    if (
        model.position_embedding_type == "learned_absolute"
        and data.seq_length < config.max_positions
    ):
        yield (
            f"seq_length {data.seq_length} is below max_position_embeddings "
            f"{config.max_positions}: later positions are never trained"
        )
    if model.is_rotary and data.seq_length > 8192:
        yarn = model.position_embedding_type == "yarn"
        scaled = yarn or model.use_rope_scaling or model.rotary_seq_len_interpolation_factor
        if model.rotary_base <= 10000 and not scaled:
            yield (
                f"rotary_base {model.rotary_base} for sequences of {data.seq_length}: v4 used "
                "500000 from 4,096 tokens on"
            )
    if model.position_embedding_type == "yarn":
        factor = model.yarn_rotary_scaling_factor
        length = int(factor * model.yarn_original_max_position_embeddings)
        if data.seq_length > length:
            yield (
                f"seq_length {data.seq_length} exceeds {length}, the length that "
                f"yarn_rotary_scaling_factor {factor:g} x yarn_original_max_position_embeddings "
                f"{model.yarn_original_max_position_embeddings} is for"
            )
    if model.vocab_size is not None:
        yield from _padding(config, model.vocab_size)


def _padding(config: Config, vocabulary: int) -> Iterator[str]:
    padding = config.padded_vocab_size - vocabulary
    if padding / config.padded_vocab_size > 0.05 and padding * config.model.hidden_size > 1e6:
        yield (
            f"{padding:,} of the padded vocabulary size {config.padded_vocab_size:,} are padding: "
            "reduce make_vocab_size_divisible_by (it is multiplied by tensor_model_parallel_size)"
        )


def _layout(config: Config, size: RunSize) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    replicas = size.world_size // parallel.model_parallel_size
    micro_batches = training.global_batch_size // (training.micro_batch_size * replicas)
    idle = pipeline_bubble(stages, micro_batches, virtual_pipeline_size(parallel))
    if idle > 0.25 and _is_large(config):
        yield (
            f"the pipeline bubble is {idle:.0%} of each step, with {stages} stages and "
            f"{micro_batches} micro-batches: increase global_batch_size, or reduce the number of "
            "stages or the data-parallel size; llm-jp-3-172b had 6.5%"
        )
    if tensor > 8:
        yield (
            f"tensor_model_parallel_size {tensor} exceeds the 8 GPUs of a node: use pipeline stages"
        )
    if tensor > 1 and not parallel.sequence_parallel and _is_large(config):
        yield (
            "sequence_parallel is disabled: the activations of normalization layers are replicated "
            f"on all {tensor} tensor-parallel processes; LLM-jp's models enabled it"
        )
    if replicas > 1 and not parallel.use_distributed_optimizer and _is_large(config):
        yield (
            f"use_distributed_optimizer is disabled: each of the {replicas} replicas holds the "
            "whole optimizer state; LLM-jp's models sharded it"
        )
    if parallel.distributed_timeout_minutes > 60:
        yield (
            f"distributed_timeout_minutes {parallel.distributed_timeout_minutes}: a dead process "
            "is detected only after that time. v4 needed it to build sample indices inside the "
            "job; here that is done before ranks wait for each other"
        )


def _recompute(config: Config, _: RunSize) -> Iterator[str]:
    # With dropout, attention on a CPU does store the scores.
    if config.parallel.recomputes_attention and not config.model.attention_dropout:
        yield (
            "recompute_granularity selective computes attention twice and saves next to no memory, "
            "because the attention kernels do not store scores: omit it, or choose other "
            "recompute_modules; full saves memory"
        )


def _log(config: Config, _: RunSize) -> Iterator[str]:
    logging = config.logging
    if logging.wandb_project is None and (logging.wandb_exp_name or logging.wandb_entity):
        yield "Weights & Biases requires wandb_project"


RULES: tuple[Callable[[Config, RunSize], Iterator[str]], ...] = (
    _epsilon,
    _saves,
    _evaluation,
    _precision,
    _rates,
    _optimizer,
    _model,
    _layout,
    _recompute,
    _log,
)
