"""GPTNeoXForCausalLM, with and without parallel residual; rinna's 3.6b has none.

``query_key_value`` has the order of megatron-core, per head q, k, v. Source: transformers,
models/gpt_neox/modeling_gpt_neox.py.
"""

from __future__ import annotations

import re
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
    whole,
)


def _rules(model: ModelConfig) -> list[TensorRule]:
    prefix = "gpt_neox.layers.{i}."
    modules = {
        f"{LAYER}input_layernorm": f"{prefix}input_layernorm",
        f"{LAYER}self_attention.linear_qkv": f"{prefix}attention.query_key_value",
        f"{LAYER}self_attention.linear_proj": f"{prefix}attention.dense",
        f"{LAYER}pre_mlp_layernorm": f"{prefix}post_attention_layernorm",
        f"{LAYER}mlp.linear_fc1": f"{prefix}mlp.dense_h_to_4h",
        f"{LAYER}mlp.linear_fc2": f"{prefix}mlp.dense_4h_to_h",
        FINAL_NORM: "gpt_neox.final_layer_norm",
    }
    rules = [
        TensorRule(f"{canonical}.{kind}", (f"{name}.{kind}",), whole)
        for canonical, name in modules.items()
        for kind in ("weight", "bias")
    ]
    # The stored name of the head is embed_out in every version; only 5.x also reads lm_head.
    return [
        TensorRule(WORD_EMBEDDINGS, ("gpt_neox.embed_in.weight",), whole),
        *rules,
        TensorRule(OUTPUT_LAYER, ("embed_out.weight",), whole),
    ]


def _requirements(model: ModelConfig) -> dict[str, bool]:
    return {
        f"position_embedding_type {model.position_embedding_type}": (
            model.position_embedding_type == "rope"
        ),
        **rope_requirements(model),
        **layer_norm_gelu_requirements(model),
    }


def _to_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_act": GELU_NAMES[model.activation_function],
        "layer_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "use_parallel_residual": model.use_parallel_residual,
        "attention_bias": True,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "rotary_pct": model.rotary_percent,
        **rope_keys(model, "rotary_emb_base", partial_rotary_factor=model.rotary_percent),
    }


def _from_config(config: dict[str, Any], where: str) -> ModelConfig:
    refuse_unsupported(where, **{"attention_bias false": not config.get("attention_bias", True)})
    parameters = rope_parameters(config, where)
    positions = rope_fields(config, where, "rotary_emb_base")
    refuse_unsupported(
        where, **{"yarn rope scaling": positions["position_embedding_type"] == "yarn"}
    )
    percent = parameters.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    heads = positive_int_field(config, "num_attention_heads", where)
    hidden = positive_int_field(config, "hidden_size", where)
    return validated_model(
        where,
        num_layers=positive_int_field(config, "num_hidden_layers", where),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        ffn_hidden_size=positive_int_field(config, "intermediate_size", where),
        max_position_embeddings=positive_int_field(
            {"max_position_embeddings": 2048, **config}, "max_position_embeddings", where
        ),
        **positions,
        rotary_percent=percent,
        norm_epsilon=config.get("layer_norm_eps", 1e-5),
        use_parallel_residual=config.get("use_parallel_residual", True),
        hidden_dropout=config.get("hidden_dropout", 0.0),
        attention_dropout=config.get("attention_dropout", 0.0),
        **layer_norm_gelu_fields(config, "hidden_act", "gelu", where),
        **embedding_fields(config, where, tied=False),
    )


ARCHITECTURE = HuggingFaceArchitecture(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "rinna 3.6b; with and without parallel residual",
    _requirements,
    _rules,
    _to_config,
    _from_config,
    ignored_keys=re.compile(r"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$"),
    sorted_as={"embed_out.weight": "lm_head.weight"},
)
