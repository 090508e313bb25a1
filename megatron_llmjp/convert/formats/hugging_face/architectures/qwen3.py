"""Qwen3ForCausalLM: LLaMA with a norm over each query and each key.

Source of names and keys: transformers, models/qwen3/modeling_qwen3.py and configuration_qwen3.py
(4.51 and 5.x).
"""

from __future__ import annotations

from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.architectures import llama
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import (
    HuggingFaceArchitecture,
    TensorRule,
)
from megatron_llmjp.convert.formats.hugging_face.architectures.known_keys import refuse_unknown_keys
from megatron_llmjp.convert.formats.hugging_face.config import (
    positive_int_field,
    refuse_unsupported,
    validated_model,
)
from megatron_llmjp.convert.tensors import LAYER, whole

FULL_ATTENTION = "full_attention"

_DEFAULTS = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
_WINDOW_KEYS = ("sliding_window", "max_window_layers", "layer_types")


def head_norm_rules() -> list[TensorRule]:
    """Return the rules of the norms of queries and keys, ``[head_dim]`` each."""
    return [
        TensorRule(
            f"{LAYER}self_attention.{x}_layernorm.weight",
            (f"{llama.LAYER_KEYS}self_attn.{x}_norm.weight",),
            whole,
        )
        for x in "qk"
    ]


def _rules(model: ModelConfig) -> list[TensorRule]:
    return [*llama.attention_rules(model), *head_norm_rules(), *llama.feed_forward_rules()]


def head_norm_requirements(model: ModelConfig) -> dict[str, bool]:
    """Return the requirements of both Qwen3 architectures."""
    return {
        **llama.decoder_requirements(model),
        "models without qk_layernorm": model.qk_layernorm,
        "biases in linear layers": not model.add_bias_linear,
    }


def _requirements(model: ModelConfig) -> dict[str, bool]:
    return {**head_norm_requirements(model), "experts": not model.has_experts}


def to_config(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json of both Qwen3 architectures."""
    return {
        **llama.decoder_keys(model),
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def refuse_windows(config: dict[str, Any], where: str) -> None:
    """Refuse biases, and attention that is limited to a window.

    Raises:
        UserError: the model has them.
    """
    kinds = config.get("layer_types") or ()
    refuse_unsupported(
        where,
        attention_bias=bool(config.get("attention_bias")),
        use_sliding_window=bool(config.get("use_sliding_window")),
        **{"layer_types with other than full_attention": any(k != FULL_ATTENTION for k in kinds)},
    )


def _from_config(config: dict[str, Any], where: str) -> ModelConfig:
    refuse_windows(config, where)
    given = {**_DEFAULTS, "head_dim": 128, "num_key_value_heads": 32, **config}
    heads = positive_int_field(given, "num_attention_heads", where)
    model = validated_model(
        where,
        num_query_groups=given["num_key_value_heads"] or heads,
        kv_channels=positive_int_field(given, "head_dim", where),
        qk_layernorm=True,
        **llama.decoder_fields(given, where),
    )
    refuse_unknown_keys(config, {*to_config(model), *_WINDOW_KEYS}, where)
    return model


ARCHITECTURE = HuggingFaceArchitecture(
    "qwen3",
    "Qwen3ForCausalLM",
    "Qwen3",
    _requirements,
    _rules,
    to_config,
    _from_config,
    ignored_keys=llama.ARCHITECTURE.ignored_keys,
)
