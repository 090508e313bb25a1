"""LlamaForCausalLM, the architecture of LLaMA, LLM-jp v2.0, llm-jp-3 and llm-jp-4-8b.

Mistral's and Qwen's architectures are derived from it: the functions without an underscore are what
they share.

Source of names and keys: transformers, models/llama/modeling_llama.py and
configuration_llama.py (4.35 and 5.x).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import (
    HuggingFaceArchitecture,
    TensorRule,
)
from megatron_llmjp.convert.formats.hugging_face.config import (
    embedding_fields,
    positive_int_field,
    refuse_unsupported,
    rope_fields,
    rope_keys,
    rope_parameters,
    rope_requirements,
    validated_model,
)
from megatron_llmjp.convert.tensors import (
    FINAL_NORM,
    LAYER,
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    Layout,
    gate_up,
    query_key_value,
    whole,
)

LAYER_KEYS = "model.layers.{i}."
"""Prefix of the keys of a layer."""


def attention_rules(model: ModelConfig) -> list[TensorRule]:
    """Return the rules of all tensors but the feed-forward layers', as in LLaMA and its kin."""
    qkv = partial(query_key_value, groups=model.query_groups, head_dim=model.head_dim)
    rules = [
        TensorRule(WORD_EMBEDDINGS, ("model.embed_tokens.weight",), whole),
        TensorRule(
            f"{LAYER}input_layernorm.weight", (f"{LAYER_KEYS}input_layernorm.weight",), whole
        ),
        TensorRule(
            f"{LAYER}pre_mlp_layernorm.weight",
            (f"{LAYER_KEYS}post_attention_layernorm.weight",),
            whole,
        ),
        TensorRule(f"{FINAL_NORM}.weight", ("model.norm.weight",), whole),
        TensorRule(OUTPUT_LAYER, ("lm_head.weight",), whole),
    ]
    linears: dict[str, tuple[tuple[str, ...], Layout]] = {
        "self_attention.linear_qkv": (tuple(f"self_attn.{x}_proj" for x in "qkv"), qkv),
        "self_attention.linear_proj": (("self_attn.o_proj",), whole),
    }
    return rules + _linear_rules(linears)


def feed_forward_rules() -> list[TensorRule]:
    """Return the rules of the dense feed-forward layers, with and without biases."""
    return _linear_rules(
        {
            "mlp.linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), gate_up),
            "mlp.linear_fc2": (("mlp.down_proj",), whole),
        }
    )


def _linear_rules(linears: dict[str, tuple[tuple[str, ...], Layout]]) -> list[TensorRule]:
    return [
        TensorRule(
            f"{LAYER}{canonical}.{kind}",
            tuple(f"{LAYER_KEYS}{name}.{kind}" for name in names),
            layout,
        )
        for canonical, (names, layout) in linears.items()
        for kind in ("weight", "bias")
    ]


def _rules(model: ModelConfig) -> list[TensorRule]:
    return attention_rules(model) + feed_forward_rules()


def decoder_requirements(model: ModelConfig) -> dict[str, bool]:
    """Return the requirements of LLaMA and its kin (see ``HuggingFaceArchitecture``)."""
    return {
        "learned position embeddings": model.is_rotary,
        f"rotary_percent {model.rotary_percent}": model.rotary_percent == 1.0,
        f"normalization {model.normalization}": model.normalization == "RMSNorm",
        f"activation {model.activation_function}": model.activation_function == "swiglu",
        "parallel residual": not model.use_parallel_residual,
        **rope_requirements(model),
        "add_qkv_bias (attention_bias includes the output projection)": not model.add_qkv_bias,
    }


def _requirements(model: ModelConfig) -> dict[str, bool]:
    return {
        **decoder_requirements(model),
        "qk_layernorm": not model.qk_layernorm,
        "experts": not model.has_experts,
    }


def decoder_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that LLaMA and its kin share."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        **rope_keys(model),
        "attention_dropout": model.attention_dropout,
    }


def _to_config(model: ModelConfig) -> dict[str, Any]:
    return {
        **decoder_keys(model),
        "attention_bias": model.add_bias_linear,
        "mlp_bias": model.add_bias_linear,
        "pretraining_tp": 1,
    }


def _from_config(config: dict[str, Any], where: str) -> ModelConfig:
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    refuse_unsupported(
        where,
        **{
            "attention_bias without mlp_bias": attention_bias and not mlp_bias,
            "mlp_bias without attention_bias": mlp_bias and not attention_bias,
        },
    )
    heads = positive_int_field(config, "num_attention_heads", where)
    hidden = positive_int_field(config, "hidden_size", where)
    return validated_model(
        where,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        add_bias_linear=attention_bias,
        **decoder_fields({"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **config}, where),
    )


def decoder_fields(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the model fields that LLaMA and its kin share, the inverse of ``decoder_keys``.

    Args:
        config: the content of config.json, with the defaults of the class where they differ.
        where: the file, for messages.

    Raises:
        UserError: an option that changes the network is not supported.
    """
    refuse_unsupported(
        where,
        hidden_act=config.get("hidden_act", "silu") not in ("silu", "swish"),
        partial_rotary_factor=rope_parameters(config, where).get(
            "partial_rotary_factor", config.get("partial_rotary_factor", 1.0)
        )
        != 1.0,
    )
    sizes = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "ffn_hidden_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
    }
    return {
        **{field: positive_int_field(config, key, where) for field, key in sizes.items()},
        **rope_fields(config, where),
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "activation_function": "swiglu",
        "attention_dropout": config.get("attention_dropout", 0.0),
        **embedding_fields(config, where, tied=False),
    }


ARCHITECTURE = HuggingFaceArchitecture(
    "llama",
    "LlamaForCausalLM",
    "LLM-jp v2.0, llm-jp-3, llm-jp-4-8b",
    _requirements,
    _rules,
    _to_config,
    _from_config,
    ignored_keys=re.compile(r"rotary_emb\.inv_freq$"),
)
