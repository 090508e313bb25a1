"""Differences between the architectures of two checkpoints.

Only fields that change the computed function are compared: initial values, dropout and the padding
of the vocabulary are settings of training, which other formats do not store.
"""

from __future__ import annotations

from typing import Any

from megatron_llmjp.config.schema import ModelConfig

TRAINING_FIELDS = frozenset(
    {
        "hidden_dropout",
        "attention_dropout",
        "init_method_std",
        "vocab_size",
        "make_vocab_size_divisible_by",
        "padded_vocab_size",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_router_bias_update_rate",
        "max_position_embeddings",  # the size of a tensor, or without effect on the function
    }
)
"""Fields that are not compared."""


def model_differences(first: ModelConfig, second: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two architectures differ, with both values."""
    left, right = _function_fields(first), _function_fields(second)
    names = [name for name in ModelConfig.model_fields if name in left or name in right]
    pairs = {name: (left.get(name), right.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _function_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that have an effect, with sizes resolved."""
    kind = model.position_embedding_type
    unused = {
        "rotary_": not model.is_rotary,
        "use_rope_scaling": not model.is_rotary,
        "rope_scaling_": not (model.is_rotary and model.use_rope_scaling),
        "yarn_": kind != "yarn",
        "add_qkv_bias": model.add_bias_linear,
        "ffn_hidden_size": model.has_experts and all(model.expert_layers),
        "moe_": not model.has_experts,
    }
    prefixes = tuple(prefix for prefix, is_unused in unused.items() if is_unused)
    found = model.model_dump(exclude=set(TRAINING_FIELDS))
    found |= model.resolved_sizes() | {"moe_layer_freq": model.expert_layers}
    balanced = model.moe_router_load_balancing_type != "sinkhorn"
    found["moe_router_load_balancing_type"] = "" if balanced else "sinkhorn"
    return {name: value for name, value in found.items() if not name.startswith(prefixes)}
