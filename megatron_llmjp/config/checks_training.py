"""Rules of training: precision, schedules in one unit each, and what needs a folder."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_llmjp.config.load import UNITS
from megatron_llmjp.config.schema import SECTION_OF, Config

OF_THE_DECAY = next(names for names in UNITS if "lr_decay_iters" in names)
"""The fields that give the length of the decay."""
OF_THE_TAIL = next(names for names in UNITS if "lr_wsd_decay_iters" in names)
"""The fields that give the length of WSD's tail."""


def rules(config: Config) -> Iterator[str]:
    """One line for each broken rule."""
    yield from _precision(config)
    yield from _units(config)
    yield from _rates(config)
    yield from _weight_decay(config)
    yield from _folders(config)
    yield from _tokenizer(config)


def _precision(config: Config) -> Iterator[str]:
    if config.training.bf16 and config.training.fp16:
        yield "bf16 and fp16 exclude each other"
    if config.optimizer.loss_scale is not None and not config.training.fp16:
        yield "loss_scale is for fp16: bf16 and fp32 need no scaling"
    if config.optimizer.optimizer == "sgd" and config.parallel.use_distributed_optimizer:
        yield (
            "megatron-core's distributed optimizer shards Adam only: set optimizer to adam, or "
            "use_distributed_optimizer to false"
        )


def _units(config: Config) -> Iterator[str]:
    """A length is given in one unit; lr_decay_fraction is where no other is."""
    for names in UNITS:
        given = [n for n in names if _is_given(config, n) and n != "lr_decay_fraction"]
        if len(given) > 1:
            yield f"{' and '.join(given)} say the same in different units: give one of them"


def _is_given(config: Config, name: str) -> bool:
    return bool(getattr(getattr(config, SECTION_OF[name]), name))


def _rates(config: Config) -> Iterator[str]:
    training, optimizer = config.training, config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield f"min_lr {optimizer.min_lr} is above lr {optimizer.lr}"
    if optimizer.lr_warmup_init > optimizer.lr:
        yield f"lr_warmup_init {optimizer.lr_warmup_init} is above lr {optimizer.lr}"
    end = optimizer.lr_decay_iters
    if end is None and not any(_is_given(config, name) for name in OF_THE_DECAY):
        end = training.train_iters
    fixed = not optimizer.lr_warmup_shorten
    if fixed and end is not None and optimizer.lr_warmup_iters >= end:
        yield (
            f"lr_warmup_iters {optimizer.lr_warmup_iters} leaves nothing of the {end} iterations "
            "of the learning-rate schedule: shorten the warm-up"
        )
    tails = [name for name in OF_THE_TAIL if _is_given(config, name)]
    if optimizer.lr_decay_style == "WSD" and not tails:
        yield f"lr_decay_style WSD needs {OF_THE_TAIL[0]}, the length of its tail"
    whole, tail = optimizer.lr_decay_iters, optimizer.lr_wsd_decay_iters
    if whole is not None and tail is not None and tail > whole:
        yield (
            f"lr_wsd_decay_iters {tail}, the tail, is longer than lr_decay_iters {whole}, the "
            "whole schedule: shorten it"
        )


def _weight_decay(config: Config) -> Iterator[str]:
    o = config.optimizer
    ends = {
        "start_weight_decay": o.start_weight_decay,
        "end_weight_decay": o.end_weight_decay,
    }
    if o.weight_decay_incr_style == "constant":
        for name, value in ends.items():
            if value is not None and value != o.weight_decay:
                yield (
                    f"{name} {value} differs from weight_decay {o.weight_decay}: set "
                    "weight_decay_incr_style to linear or cosine, or leave it out"
                )
    elif None in ends.values():
        yield (
            f"weight_decay_incr_style {o.weight_decay_incr_style} needs start_weight_decay and "
            "end_weight_decay"
        )
    elif (o.start_weight_decay or 0.0) > (o.end_weight_decay or 0.0):
        yield (
            f"start_weight_decay {o.start_weight_decay} is above end_weight_decay "
            f"{o.end_weight_decay}: weight decay can only grow"
        )


def _folders(config: Config) -> Iterator[str]:
    checkpoint, faults = config.checkpoint, config.faults
    if checkpoint.save is None:
        for name in ("save_interval", "save_interval_tokens", "save_interval_minutes"):
            if getattr(checkpoint, name) is not None:
                yield f"{name} needs save, the folder to save in"
        if checkpoint.save_policy is not None:
            yield "save_policy needs save, the folder to save in"
        for name in ("exit_interval", "exit_duration_in_mins"):
            if getattr(faults, name) is not None:
                yield f"{name} saves before it stops: give save, the folder to save in"
        if faults.spike_action == "rollback":
            yield "spike_action rollback goes back to a checkpoint: give save, or choose skip"
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        yield "keep_every says what is kept beside keep_last, which is not given: all are kept"
    if checkpoint.finetune and checkpoint.load is None and checkpoint.save is None:
        yield "finetune starts from weights: give load, the folder that has them"
    if config.training.eval_only and checkpoint.load is None and checkpoint.save is None:
        yield "eval_only needs a model: give load, the folder of its checkpoint"


def _tokenizer(config: Config) -> Iterator[str]:
    data = config.data
    if data.tiktoken_special_tokens and data.tokenizer_type != "TikTokenizer":
        yield (
            "tiktoken_special_tokens is for tokenizer_type TikTokenizer: other tokenizers have "
            "their special tokens in their files. Remove it, or add the tokens to the tokenizer"
        )
