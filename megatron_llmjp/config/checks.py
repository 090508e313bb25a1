"""Rules across fields. All that are broken are told at once, each with its remedy.

Here are the rules of the model itself; those of its layout over processes are in
``checks_layout.py``, those of training in ``checks_training.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_llmjp.config import checks_layout, checks_training
from megatron_llmjp.config.checks_layout import data_parallel_size
from megatron_llmjp.config.schema import Config, ModelConfig
from megatron_llmjp.errors import UserError

__all__ = ["check", "data_parallel_size"]


def check(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run on ``world_size`` processes.

    Raises:
        UserError: one line for each broken rule.
    """
    problems = [
        *checks_layout.rules(config, world_size),
        *_model(config),
        *checks_training.rules(config),
    ]
    if problems:
        raise UserError("\n".join(problems))


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"hidden_size {model.hidden_size} does not divide by num_attention_heads "
            f"{model.num_attention_heads}: change one of them, or give kv_channels"
        )
    if model.num_attention_heads % model.query_groups:
        yield (
            f"num_attention_heads {model.num_attention_heads} does not divide by num_query_groups "
            f"{model.query_groups}: possible groups are "
            f"{checks_layout.divisors(model.num_attention_heads)}"
        )
    if model.activation_function == "swiglu" and model.add_bias_linear:
        yield "swiglu with add_bias_linear is not supported: set add_bias_linear to false"
    if config.data.seq_length > config.positions:
        yield (
            f"seq_length {config.data.seq_length} exceeds max_position_embeddings "
            f"{config.positions}: shorten the sequence or enlarge the model's positions"
        )
    yield from _positions(config)
    yield from _vocabulary(config)


def _positions(config: Config) -> Iterator[str]:
    model = config.model
    if model.is_rotary:
        rotated = int(model.head_dim * model.rotary_percent)
        if rotated % 2 or rotated == 0:
            yield (
                f"rotary_percent {model.rotary_percent} of heads of {model.head_dim} rotates "
                f"{rotated} numbers, which make no pairs: choose an even part of the head"
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
                f"{name} is for rotary positions: set position_embedding_type to rope, or leave "
                f"{name} out"
            )


def _yarn(model: ModelConfig) -> Iterator[str]:
    """megatron-core's YaRN takes no notice of the other ways to change the frequencies."""
    for name, given in (
        ("use_rope_scaling", model.use_rope_scaling),
        ("rotary_seq_len_interpolation_factor", model.rotary_seq_len_interpolation_factor),
        ("rotary_percent", model.rotary_percent != 1.0),
    ):
        if given:
            yield f"{name} has no effect with position_embedding_type yarn: leave one of them out"
    if (model.yarn_mscale is None) != (model.yarn_mscale_all_dim is None):
        yield "yarn_mscale and yarn_mscale_all_dim: give both or none"


def _vocabulary(config: Config) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    rows = model.padded_vocab_size
    if rows is None:
        return
    if rows % tensor:
        yield (
            f"tensor_model_parallel_size {tensor} does not divide padded_vocab_size {rows}: "
            "choose one that does, or have the vocabulary padded anew with --override-resume "
            "padded_vocab_size"
        )
    if model.vocab_size is not None and rows < model.vocab_size:
        yield (
            f"padded_vocab_size {rows} is below vocab_size {model.vocab_size}: leave it out to "
            "have it computed"
        )
