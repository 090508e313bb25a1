"""Warnings on a configuration that runs, but as a run has gone wrong before.

Each names the practice it comes from: LLM-jp's published scripts, model cards and reports, or what
this program is made for. A warning never stops a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_llmjp.config.learning_rate_rules import decay_warnings
from megatron_llmjp.config.parameter_counts import layer_parameters
from megatron_llmjp.config.pipeline_layout import pipeline_bubble, virtual_pipeline_size
from megatron_llmjp.config.schema import Config

LONG_RUN_ITERATIONS = 1000
"""Iterations from which a run is more than a trial."""
LARGE_MODEL_PARAMETERS = 5e8
"""Parameters from which a model is more than a trial."""


@dataclass(frozen=True)
class RunSize:
    """What is known of a run besides its configuration."""

    world_size: int
    train_iters: int
    decay_end: int | None
    """The iteration that the learning rate's decay ends at."""
    validation_sets: int

    @property
    def is_long(self) -> bool:
        """Whether this is more than a trial."""
        return self.train_iters >= LONG_RUN_ITERATIONS


def config_warnings(config: Config, facts: RunSize) -> list[str]:
    """Warnings on a resolved configuration, the costliest mistakes first."""
    return [
        *decay_warnings(config.optimizer, facts.decay_end, facts.train_iters),
        *(warning for rule in RULES for warning in rule(config, facts)),
    ]


def _is_large(config: Config) -> bool:
    """Whether the layers have enough parameters for more than a test."""
    return layer_parameters(config.model) * config.model.num_layers >= LARGE_MODEL_PARAMETERS


def _epsilon(config: Config, _: RunSize) -> Iterator[str]:
    o = config.optimizer
    if o.optimizer == "adam" and o.adam_eps > 1e-7:
        yield (
            f"adam_eps {o.adam_eps:g}: llm-jp-3-172b alpha1 and alpha2 were trained with 1e-5 and "
            "given up for it; the later models took 1e-8"
        )


def _saves(config: Config, facts: RunSize) -> Iterator[str]:
    c = config.checkpoint
    by_length = (c.save_interval, c.save_interval_tokens, c.save_interval_minutes)
    if c.save is None:
        if facts.is_long:
            yield f"save is not given: {facts.train_iters:,} iterations would leave nothing behind"
    elif c.save_policy is None and not any(by_length):
        if facts.is_long:
            yield (
                "no save_interval: between the folds' ends nothing is saved, and a crash costs "
                "all of it. llm-jp-3 saved every 1,000 iterations (save_policy llm-jp)"
            )
    elif c.save_interval is not None and c.save_interval > facts.train_iters:
        yield (
            f"save_interval {c.save_interval:,} is longer than the run of "
            f"{facts.train_iters:,} iterations: only its end is saved"
        )


def _evaluation(config: Config, facts: RunSize) -> Iterator[str]:
    training = config.training
    if not facts.is_long:
        return
    if not training.eval_iters or not facts.validation_sets:
        what = "eval_iters is 0" if not training.eval_iters else "there are no validation sets"
        yield (
            f"{what}: the loss on held-out text stays unknown, as in the llm-jp-3 and v4 runs, "
            "whose evaluation was off; give the fold file `validation` and eval_iters 10"
        )
    elif training.eval_interval is not None and training.eval_interval > facts.train_iters:
        yield (
            f"eval_interval {training.eval_interval:,} is longer than the run of "
            f"{facts.train_iters:,} iterations: only its end is validated"
        )


def _precision(config: Config, _: RunSize) -> Iterator[str]:
    training = config.training
    if not _is_large(config) or training.bf16:
        return
    if training.fp16:
        yield (
            "fp16: a loss scale can collapse in a model of this size; all LLM-jp models since "
            "v2.0 took bf16"
        )
    else:
        yield "fp32: this takes twice the memory of bf16 and many times the time on a GPU"


def _rates(config: Config, facts: RunSize) -> Iterator[str]:
    o = config.optimizer
    given = (o.lr_warmup_iters, o.lr_warmup_samples, o.lr_warmup_tokens, o.lr_warmup_fraction)
    if (
        facts.is_long
        and o.optimizer == "adam"
        and not any(given)
        and not config.checkpoint.finetune
    ):
        yield "no warm-up: Adam's first steps are its wildest; LLM-jp's models took 2,000 of them"
    if facts.is_long and o.lr_warmup_iters * 5 > facts.train_iters:
        yield (
            f"the warm-up of {o.lr_warmup_iters:,} iterations takes more than a fifth of the "
            f"run's {facts.train_iters:,}"
        )
    if o.lr_decay_style not in ("constant", "WSD") and o.min_lr > o.lr / 5:
        yield (
            f"min_lr {o.min_lr:g} is more than a fifth of lr {o.lr:g}, so there is hardly a decay; "
            "llm-jp-3 and v4 ended at a tenth"
        )
    if o.lr_decay_style not in ("constant", "WSD") and o.min_lr == 0 and facts.is_long:
        yield (
            "min_lr 0: the last iterations learn nothing, and going on later means warming up "
            "anew; llm-jp-3 and v4 ended at a tenth of lr"
        )


def _optimizer(config: Config, facts: RunSize) -> Iterator[str]:
    o = config.optimizer
    if not facts.is_long:
        return
    if o.optimizer == "adam" and o.adam_beta2 > 0.99:
        yield f"adam_beta2 {o.adam_beta2:g} is Megatron-LM's default; LLM-jp's models took 0.95"
    if o.weight_decay == 0 and not o.end_weight_decay:
        yield "weight_decay is 0; LLM-jp's models took 0.1"
    if o.clip_grad == 0:
        yield "clip_grad is 0: one bad batch can ruin the weights; LLM-jp's models took 1.0"


def _model(config: Config, _: RunSize) -> Iterator[str]:
    model, data = config.model, config.data
    if model.normalization == "RMSNorm" and (model.hidden_dropout or model.attention_dropout):
        yield (
            "dropout in a LLaMA-style model: LLM-jp's had none since v2.0, and Megatron-LM's "
            "default of 0.1 comes in by leaving --hidden-dropout 0 --attention-dropout 0 out"
        )
    if (
        model.position_embedding_type == "learned_absolute"
        and data.seq_length < config.max_positions
    ):
        yield (
            f"seq_length {data.seq_length} is below max_position_embeddings "
            f"{config.max_positions}: the positions behind it are never trained"
        )
    if model.is_rotary and data.seq_length > 8192:
        yarn = model.position_embedding_type == "yarn"
        scaled = yarn or model.use_rope_scaling or model.rotary_seq_len_interpolation_factor
        if model.rotary_base <= 10000 and not scaled:
            yield (
                f"rotary_base {model.rotary_base} for sequences of {data.seq_length}: v4 took "
                "500000 from 4,096 on"
            )
    if model.vocab_size is not None:
        yield from _padding(config, model.vocab_size)


def _padding(config: Config, vocabulary: int) -> Iterator[str]:
    wasted = config.padded_vocab_size - vocabulary
    if wasted / config.padded_vocab_size > 0.05 and wasted * config.model.hidden_size > 1e6:
        yield (
            f"{wasted:,} of the embedding's {config.padded_vocab_size:,} rows are padding: lower "
            "make_vocab_size_divisible_by (it is multiplied by tensor_model_parallel_size)"
        )


def _layout(config: Config, facts: RunSize) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    replicas = facts.world_size // parallel.model_parallel_size
    micro_batches = training.global_batch_size // (training.micro_batch_size * replicas)
    idle = pipeline_bubble(stages, micro_batches, virtual_pipeline_size(parallel))
    if idle > 0.25 and _is_large(config):
        yield (
            f"{idle:.0%} of each step the pipeline's {stages} stages wait, with {micro_batches} "
            "micro-batches: enlarge global_batch_size or lower the stages or data parallelism. "
            "llm-jp-3-172b had 6.5%"
        )
    if tensor > 8:
        yield f"tensor_model_parallel_size {tensor} leaves the node of 8 GPUs: use pipeline stages"
    if tensor > 1 and not parallel.sequence_parallel and _is_large(config):
        yield (
            "sequence_parallel is off: norms and their activations are held by all "
            f"{tensor} tensor-parallel processes; LLM-jp's models had it on"
        )
    if replicas > 1 and not parallel.use_distributed_optimizer and _is_large(config):
        yield (
            f"use_distributed_optimizer is off: each of the {replicas} copies holds the whole "
            "optimizer state; LLM-jp's models shared it"
        )
    if parallel.distributed_timeout_minutes > 60:
        yield (
            f"distributed_timeout_minutes {parallel.distributed_timeout_minutes}: a dead process "
            "is noticed that late. v4 needed it to index its data inside the job; here that is "
            "done before ranks wait for each other"
        )


def _log(config: Config, _: RunSize) -> Iterator[str]:
    logging = config.logging
    if logging.wandb_project is None and (logging.wandb_exp_name or logging.wandb_entity):
        yield "Weights & Biases is not used without wandb_project"


RULES: tuple[Callable[[Config, RunSize], Iterator[str]], ...] = (
    _epsilon,
    _saves,
    _evaluation,
    _precision,
    _rates,
    _optimizer,
    _model,
    _layout,
    _log,
)
