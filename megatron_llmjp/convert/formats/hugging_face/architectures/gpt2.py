"""GPT2LMHeadModel, the architecture of GPT-2 and LLM-jp v1.0.

Linear layers are Conv1D, stored as ``[in, out]``; the columns of ``c_attn`` are q | k | v. Source:
transformers, models/gpt2/modeling_gpt2.py.
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
    GELU_NAMES,
    embedding_fields,
    layer_norm_gelu_fields,
    layer_norm_gelu_requirements,
    positive_int_field,
    refuse_unsupported,
    validated_model,
)
from megatron_llmjp.convert.tensors import (
    FINAL_NORM,
    LAYER,
    OUTPUT_LAYER,
    POSITION_EMBEDDINGS,
    WORD_EMBEDDINGS,
    Layout,
    query_key_value_conv1d,
    transposed,
    whole,
)


def _rules(model: ModelConfig) -> list[TensorRule]:
    qkv = partial(query_key_value_conv1d, heads=model.num_attention_heads)
    prefix = "transformer.h.{i}."
    rules = [
        TensorRule(WORD_EMBEDDINGS, ("transformer.wte.weight",), whole),
        TensorRule(POSITION_EMBEDDINGS, ("transformer.wpe.weight",), whole),
        TensorRule(OUTPUT_LAYER, ("lm_head.weight",), whole),
    ]
    linears: dict[str, tuple[str, Layout, Layout]] = {
        "self_attention.linear_qkv": ("attn.c_attn", qkv, qkv),
        "self_attention.linear_proj": ("attn.c_proj", transposed, whole),
        "mlp.linear_fc1": ("mlp.c_fc", transposed, whole),
        "mlp.linear_fc2": ("mlp.c_proj", transposed, whole),
    }
    for canonical, (name, weight, bias) in linears.items():
        rules.append(TensorRule(f"{LAYER}{canonical}.weight", (f"{prefix}{name}.weight",), weight))
        rules.append(TensorRule(f"{LAYER}{canonical}.bias", (f"{prefix}{name}.bias",), bias))
    norms = {
        f"{LAYER}input_layernorm": f"{prefix}ln_1",
        f"{LAYER}pre_mlp_layernorm": f"{prefix}ln_2",
        FINAL_NORM: "transformer.ln_f",
    }
    for canonical, name in norms.items():
        rules += [
            TensorRule(f"{canonical}.{kind}", (f"{name}.{kind}",), whole)
            for kind in ("weight", "bias")
        ]
    return rules


def _requirements(model: ModelConfig) -> dict[str, bool]:
    return {
        "rotary position embeddings": model.position_embedding_type == "learned_absolute",
        "parallel residual": not model.use_parallel_residual,
        **layer_norm_gelu_requirements(model),
    }


def _to_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "n_ctx": model.max_position_embeddings,
        "activation_function": GELU_NAMES[model.activation_function],
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }


def _from_config(config: dict[str, Any], where: str) -> ModelConfig:
    refuse_unsupported(
        where,
        scale_attn_weights=not config.get("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=config.get("scale_attn_by_inverse_layer_idx", False),
        add_cross_attention=config.get("add_cross_attention", False),
    )
    hidden, heads = (
        positive_int_field(config, "n_embd", where),
        positive_int_field(config, "n_head", where),
    )
    return validated_model(
        where,
        num_layers=positive_int_field(config, "n_layer", where),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        ffn_hidden_size=config.get("n_inner") or 4 * hidden,
        max_position_embeddings=positive_int_field(config, "n_positions", where),
        position_embedding_type="learned_absolute",
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        hidden_dropout=config.get("resid_pdrop", 0.1),
        attention_dropout=config.get("attn_pdrop", 0.1),
        **layer_norm_gelu_fields(config, "activation_function", "gelu_new", where),
        **embedding_fields(config, where, tied=True),
    )


ARCHITECTURE = HuggingFaceArchitecture(
    "gpt2",
    "GPT2LMHeadModel",
    "LLM-jp v1.0",
    _requirements,
    _rules,
    _to_config,
    _from_config,
    ignored_keys=re.compile(r"\.attn\.(masked_)?bias$"),  # causal masks of older versions
    base_prefix="transformer.",
    transposed_linears=True,
)
