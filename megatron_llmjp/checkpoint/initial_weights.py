"""Compatibility of a model with the weights that a new run starts from (``--finetune``).

Without torch. Weights have the shapes of the architecture; what has no weights may change, such as
the length of sequences and the rotary frequencies of models that are extended to long contexts.
"""

from __future__ import annotations

from megatron_llmjp.checkpoint.resume import Resume
from megatron_llmjp.config.loading import config_differences
from megatron_llmjp.config.schema import Config, ModelConfig
from megatron_llmjp.errors import UserError

_WEIGHT_SHAPE_FIELDS = {
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "num_moe_experts",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_enable_expert_bias",
    "untie_embeddings_and_output_weights",
}
"""Fields that determine the names and shapes of the weights."""

_WEIGHT_SHAPE_VALUES = {
    "activation_function": "swiglu",
    "position_embedding_type": "learned_absolute",
}
"""Fields of which only this value, compared with any other, changes the weights."""


_NOT_OF_THE_FUNCTION = {
    "init_method_std",
    "hidden_dropout",
    "attention_dropout",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
}
"""Fields of the model that do not change the outputs of given weights."""


def check_weights(config: Config, resume: Resume) -> list[str]:
    """Refuse to start from weights of another architecture (``--finetune``).

    Positions may change as far as they have no weights: longer sequences, and another base or
    scaling of the rotary frequencies.

    Returns:
        Notes on changed fields that change the outputs of the weights.

    Raises:
        UserError: fields of the architecture differ; the message lists all of them.
    """
    found = config_differences(resume.config, config)
    problems = [
        f"{name} is {new!r}, but the weights of {resume.folder} were trained with {old!r}: set it "
        "back, or start from other weights"
        for name, (old, new) in found.items()
        if name in _WEIGHT_SHAPE_FIELDS
        or (name in _WEIGHT_SHAPE_VALUES and _WEIGHT_SHAPE_VALUES[name] in (old, new))
    ]
    old, new = resume.config.max_positions, config.max_positions
    learned = not (config.model.is_rotary or resume.config.model.is_rotary)
    if learned and old != new:
        problems.append(
            f"max_position_embeddings is {new}, but the weights of {resume.folder} have learned "
            f"embeddings of {old} positions: set it back; only rotary models can be trained on "
            "longer sequences"
        )
    if problems:
        raise UserError("\n".join(problems))
    changed = {name: found[name] for name in found if name in ModelConfig.model_fields}
    if old != new:
        changed["max_position_embeddings"] = old, new
    notes = [
        f"{name}: the weights were trained with {before!r}, now {now!r}"
        for name, (before, now) in changed.items()
        if name not in _NOT_OF_THE_FUNCTION
    ]
    return notes + _original_length_notes(config, resume)


def _original_length_notes(config: Config, resume: Resume) -> list[str]:
    """Compare the original length of a newly enabled scaling with that of the weights."""
    model, trained = config.model, resume.config.max_positions
    scalings = {
        "rope_scaling_original_max_position_embeddings": model.use_rope_scaling
        and not resume.config.model.use_rope_scaling,
        "yarn_original_max_position_embeddings": model.position_embedding_type == "yarn"
        and resume.config.model.position_embedding_type != "yarn",
    }
    return [
        f"{name} is {getattr(model, name)}, but the weights were trained with "
        f"max_position_embeddings {trained}: --{name.replace('_', '-')} {trained} scales from that "
        "length"
        for name, enabled in scalings.items()
        if enabled and getattr(model, name) != trained
    ]
