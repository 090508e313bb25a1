"""Validation of a configuration: rules across fields, all violations reported together.

Rules of the model, precision, learning rate, checkpoints and tokenizer; those of the parallel
layout are in ``layout_validation.py``. Each message names the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_llmjp.config.expert_validation import expert_problems
from megatron_llmjp.config.layout_validation import divisors, layout_problems
from megatron_llmjp.config.learning_rate_rules import ScheduleLengths, learning_rate_problems
from megatron_llmjp.config.loading import EQUIVALENT_UNITS
from megatron_llmjp.config.profiling_config import profiling_problems
from megatron_llmjp.config.schema import SECTION_OF, CheckpointConfig, Config, ModelConfig
from megatron_llmjp.errors import UserError

DECAY_LENGTH_FIELDS = next(names for names in EQUIVALENT_UNITS if "lr_decay_iters" in names)
"""Fields that give the length of the learning-rate decay."""
WSD_DECAY_LENGTH_FIELDS = next(names for names in EQUIVALENT_UNITS if "lr_wsd_decay_iters" in names)
"""Fields that give the length of WSD's final decay."""


SAVE_RULES = (
    "save_interval",
    "save_interval_tokens",
    "save_interval_minutes",
    "save_policy",
    "non_persistent_save_interval",
    "non_persistent_save_minutes",
)
"""Fields that require ``save``, except in presets: these are also used without saving."""


def check_save_rules(config: Config, origin: Mapping[str, str]) -> None:
    """Refuse save rules without a save folder.

    Args:
        config: a configuration.
        origin: origin of each value by field, as in ``ConfigLayers.origin``.

    Raises:
        UserError: one line for each such rule that no preset gave.
    """
    checkpoint = config.checkpoint
    # The complete configuration that a dry run prints has the defaults.
    defaults = {name: info.default for name, info in CheckpointConfig.model_fields.items()}
    values = {name: getattr(checkpoint, name) for name in SAVE_RULES}
    given = [name for name, value in values.items() if value and value != defaults[name]]
    given = [name for name in given if not origin.get(name, "").startswith("preset ")]
    if given and checkpoint.save is None:
        lines = (f"{name} requires save, the folder of the checkpoints" for name in given)
        raise UserError("\n".join(lines))


def check_config(config: Config, world_size: int) -> None:
    """Validate a configuration for ``world_size`` processes.

    Raises:
        UserError: one line for each violated rule.
    """
    rules = (
        _model,
        expert_problems,
        _precision,
        _units,
        _rates,
        _weight_decay,
        _folders,
        _tokenizer,
        _alerts,
    )
    problems = [
        *layout_problems(config, world_size),
        *profiling_problems(config.profiling, config.checkpoint.save, world_size),
    ]
    for rule in rules:
        problems += rule(config)
    if problems:
        raise UserError("\n".join(problems))


def _alerts(config: Config) -> Iterator[str]:
    webhook = config.logging.alert_webhook
    if webhook and not webhook.get_secret_value().startswith(("http://", "https://")):
        yield "alert_webhook must be a URL that starts with https:// or http://"


def _precision(config: Config) -> Iterator[str]:
    if config.training.bf16 and config.training.fp16:
        yield "bf16 and fp16 are mutually exclusive"
    if config.optimizer.loss_scale is not None and not config.training.fp16:
        yield "loss_scale requires fp16: bf16 and fp32 need no loss scaling"
    if config.optimizer.optimizer == "sgd" and config.parallel.use_distributed_optimizer:
        yield (
            "megatron-core's distributed optimizer supports Adam only: set optimizer to adam, or "
            "use_distributed_optimizer to false"
        )


def _units(config: Config) -> Iterator[str]:
    """Rules of lengths in several units: one unit each, except lr_decay_fraction as a fallback."""
    for names in EQUIVALENT_UNITS:
        given = [n for n in names if _is_given(config, n) and n != "lr_decay_fraction"]
        if len(given) > 1:
            yield f"{' and '.join(given)} are the same length in different units: set one of them"


def _is_given(config: Config, name: str) -> bool:
    return bool(getattr(getattr(config, SECTION_OF[name]), name))


def _rates(config: Config) -> Iterator[str]:
    training, optimizer = config.training, config.optimizer
    end, name = optimizer.lr_decay_iters, "lr_decay_iters"
    if end is None and not any(_is_given(config, name) for name in DECAY_LENGTH_FIELDS):
        end, name = training.train_iters, "train_iters"
    lengths = ScheduleLengths(
        unit="iters",
        warmup=0 if optimizer.lr_warmup_shorten else optimizer.lr_warmup_iters,
        decay=end,
        wsd_decay=optimizer.lr_wsd_decay_iters,
        decay_name=name,
    )
    yield from learning_rate_problems(
        optimizer.lr,
        optimizer.min_lr,
        optimizer.lr_warmup_init,
        optimizer.lr_decay_style,
        lengths,
        has_wsd_decay=any(_is_given(config, name) for name in WSD_DECAY_LENGTH_FIELDS),
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
                    f"weight_decay_incr_style to linear or cosine, or remove {name}"
                )
    elif None in ends.values():
        yield (
            f"weight_decay_incr_style {o.weight_decay_incr_style} requires start_weight_decay and "
            "end_weight_decay"
        )
    elif (o.start_weight_decay or 0.0) > (o.end_weight_decay or 0.0):
        yield (
            f"start_weight_decay {o.start_weight_decay} is above end_weight_decay "
            f"{o.end_weight_decay}: weight decay can only increase"
        )


def _folders(config: Config) -> Iterator[str]:
    checkpoint, faults = config.checkpoint, config.faults
    if checkpoint.save is None:
        for name in ("exit_interval", "exit_duration_in_mins"):
            if getattr(faults, name) is not None:
                yield f"{name} saves before exiting: set save, the folder of the checkpoints"
        if faults.spike_action == "rollback":
            yield "spike_action rollback requires checkpoints: set save, or choose skip"
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        yield (
            "keep_every has no effect without keep_last, since all checkpoints are kept: set "
            "keep_last"
        )
    if checkpoint.finetune and checkpoint.load is None and checkpoint.save is None:
        yield "finetune requires load, the folder of the weights"
    if config.training.eval_only and checkpoint.load is None and checkpoint.save is None:
        yield "eval_only requires load, the folder of the checkpoint"


def _tokenizer(config: Config) -> Iterator[str]:
    data = config.data
    if data.tiktoken_special_tokens and data.tokenizer_type != "TikTokenizer":
        yield (
            "tiktoken_special_tokens requires tokenizer_type TikTokenizer: other tokenizers have "
            "their special tokens in their files. Remove it, or add the tokens to the tokenizer"
        )


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"hidden_size {model.hidden_size} is not divisible by num_attention_heads "
            f"{model.num_attention_heads}: change one of them, or set kv_channels"
        )
    if model.num_attention_heads % model.query_groups:
        yield (
            f"num_attention_heads {model.num_attention_heads} is not divisible by num_query_groups "
            f"{model.query_groups}: possible numbers of groups are "
            f"{divisors(model.num_attention_heads)}"
        )
    if model.activation_function == "swiglu" and model.add_bias_linear:
        yield "swiglu with add_bias_linear is not supported: set add_bias_linear to false"
    if config.data.seq_length > config.max_positions:
        yield (
            f"seq_length {config.data.seq_length} exceeds max_position_embeddings "
            f"{config.max_positions}: reduce seq_length or increase max_position_embeddings"
        )
    yield from _positions(config)
    yield from _vocabulary(config)


def _positions(config: Config) -> Iterator[str]:
    model = config.model
    if model.is_rotary:
        rotated = int(model.head_dim * model.rotary_percent)
        if rotated % 2 or rotated == 0:
            yield (
                f"rotary_percent {model.rotary_percent} of head size {model.head_dim} is "
                f"{rotated}: the number of rotated dimensions must be even and positive"
            )
        if model.position_embedding_type == "yarn":
            yield from _yarn(model)
        low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
        if model.use_rope_scaling and low >= high:
            yield (
                f"rope_scaling_low_freq_factor {low} must be below rope_scaling_high_freq_factor "
                f"{high}"
            )
        return
    for name, given in (
        ("use_rope_scaling", model.use_rope_scaling),
        ("rotary_seq_len_interpolation_factor", model.rotary_seq_len_interpolation_factor),
        ("rotary_percent", model.rotary_percent != 1.0),
    ):
        if given:
            yield (
                f"{name} requires rotary embeddings: set position_embedding_type to rope, or "
                f"remove {name}"
            )


def _yarn(model: ModelConfig) -> Iterator[str]:
    """Rules of YaRN; megatron-core's ignores the other settings of rotary frequencies."""
    for name, given in (
        ("use_rope_scaling", model.use_rope_scaling),
        ("rotary_seq_len_interpolation_factor", model.rotary_seq_len_interpolation_factor),
        ("rotary_percent", model.rotary_percent != 1.0),
    ):
        if given:
            yield f"{name} has no effect with position_embedding_type yarn: remove one of them"
    if (model.yarn_mscale is None) != (model.yarn_mscale_all_dim is None):
        yield "yarn_mscale and yarn_mscale_all_dim must be set together"


def _vocabulary(config: Config) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    padded = model.padded_vocab_size
    if padded is None:
        return
    if padded % tensor:
        yield (
            f"padded_vocab_size {padded} is not divisible by tensor_model_parallel_size {tensor}: "
            "choose a divisor, or compute the padding again with --override-resume "
            "padded_vocab_size"
        )
    if model.vocab_size is not None and padded < model.vocab_size:
        yield (
            f"padded_vocab_size {padded} is below vocab_size {model.vocab_size}: remove it to "
            "have it computed"
        )
