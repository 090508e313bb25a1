"""LlamaForCausalLM, the architecture of LLaMA, LLM-jp v2.0 and llm-jp-3.

Source of names and keys: transformers, models/llama/modeling_llama.py and
configuration_llama.py (4.35 and 5.x).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.architecture import (
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

_PREFIX = "model.layers.{i}."


def _rules(model: ModelConfig) -> list[TensorRule]:
    qkv = partial(query_key_value, groups=model.query_groups, head_dim=model.head_dim)
    rules = [
        TensorRule(WORD_EMBEDDINGS, ("model.embed_tokens.weight",), whole),
        TensorRule(f"{LAYER}input_layernorm.weight", (f"{_PREFIX}input_layernorm.weight",), whole),
        TensorRule(
            f"{LAYER}pre_mlp_layernorm.weight",
            (f"{_PREFIX}post_attention_layernorm.weight",),
            whole,
        ),
        TensorRule(f"{FINAL_NORM}.weight", ("model.norm.weight",), whole),
        TensorRule(OUTPUT_LAYER, ("lm_head.weight",), whole),
    ]
    linears: dict[str, tuple[tuple[str, ...], Layout]] = {
        "self_attention.linear_qkv": (tuple(f"self_attn.{x}_proj" for x in "qkv"), qkv),
        "self_attention.linear_proj": (("self_attn.o_proj",), whole),
        "mlp.linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), gate_up),
        "mlp.linear_fc2": (("mlp.down_proj",), whole),
    }
    for canonical, (names, layout) in linears.items():
        for kind in ("weight", "bias"):
            keys = tuple(f"{_PREFIX}{name}.{kind}" for name in names)
            rules.append(TensorRule(f"{LAYER}{canonical}.{kind}", keys, layout))
    return rules


def _requirements(model: ModelConfig) -> dict[str, bool]:
    return {
        "learned position embeddings": model.is_rotary,
        f"rotary_percent {model.rotary_percent}": model.rotary_percent == 1.0,
        f"normalization {model.normalization}": model.normalization == "RMSNorm",
        f"activation {model.activation_function}": model.activation_function == "swiglu",
        "parallel residual": not model.use_parallel_residual,
        **rope_requirements(model),
        "add_qkv_bias (attention_bias includes the output projection)": not model.add_qkv_bias,
    }


def _to_config(model: ModelConfig) -> dict[str, Any]:
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
        "attention_bias": model.add_bias_linear,
        "attention_dropout": model.attention_dropout,
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
        hidden_act=config.get("hidden_act", "silu") not in ("silu", "swish"),
        partial_rotary_factor=rope_parameters(config, where).get(
            "partial_rotary_factor", config.get("partial_rotary_factor", 1.0)
        )
        != 1.0,
    )
    heads = positive_int_field(config, "num_attention_heads", where)
    hidden = positive_int_field(config, "hidden_size", where)
    return validated_model(
        where,
        num_layers=positive_int_field(config, "num_hidden_layers", where),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        ffn_hidden_size=positive_int_field(config, "intermediate_size", where),
        max_position_embeddings=positive_int_field(
            {"max_position_embeddings": 2048, **config}, "max_position_embeddings", where
        ),
        **rope_fields(config, where),
        normalization="RMSNorm",
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        activation_function="swiglu",
        add_bias_linear=attention_bias,
        attention_dropout=config.get("attention_dropout", 0.0),
        **embedding_fields(config, where, tied=False),
    )


ARCHITECTURE = HuggingFaceArchitecture(
    "llama",
    "LlamaForCausalLM",
    "LLM-jp v2.0, llm-jp-3",
    _requirements,
    _rules,
    _to_config,
    _from_config,
    ignored_keys=re.compile(r"rotary_emb\.inv_freq$"),
)
