"""MixtralForCausalLM: LLaMA with experts in every layer, as in llm-jp-3-8x13b.

The scores of the chosen experts are normalized: softmax over all and division by their sum is the
softmax over the chosen ones, megatron-core's default.

Source of names and keys: transformers, models/mixtral/modeling_mixtral.py and
configuration_mixtral.py (4.36 and 5.x); conversion_mapping.py of 5.x, which renames the stored
keys.
"""

from __future__ import annotations

from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.architectures import experts, llama
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import (
    HuggingFaceArchitecture,
    TensorRule,
)
from megatron_llmjp.convert.formats.hugging_face.architectures.known_keys import (
    refuse_unknown_keys,
)
from megatron_llmjp.convert.formats.hugging_face.config import (
    positive_int_field,
    refuse_unsupported,
    validated_model,
)

_DEFAULTS = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}
_BASE = 1000000.0
_TRAINING_KEYS = ("router_jitter_noise",)


def _rules(model: ModelConfig) -> list[TensorRule]:
    # w1 is the gate, w3 the other input projection, w2 the output projection.
    return llama.attention_rules(model) + experts.expert_rules("block_sparse_moe", "w1", "w3", "w2")


def _requirements(model: ModelConfig) -> dict[str, bool]:
    return {
        **llama.decoder_requirements(model),
        "qk_layernorm": not model.qk_layernorm,
        "biases in linear layers": not model.add_bias_linear,
        **experts.expert_requirements(model),
        "layers without experts": all(model.expert_layers) or not model.has_experts,
        "moe_router_pre_softmax": not model.moe_router_pre_softmax,
    }


def _to_config(model: ModelConfig) -> dict[str, Any]:
    return {
        **llama.decoder_keys(model),
        "intermediate_size": model.expert_ffn_size,
        "num_local_experts": model.num_moe_experts,
        **experts.router_keys(model),
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def _from_config(config: dict[str, Any], where: str) -> ModelConfig:
    given = {**_DEFAULTS, **config}
    if "rope_parameters" not in config:
        given = {"rope_theta": _BASE, **given}
    refuse_unsupported(
        where,
        sliding_window=config.get("sliding_window") is not None,
        attention_bias=bool(config.get("attention_bias")),
    )
    heads = positive_int_field(given, "num_attention_heads", where)
    hidden = positive_int_field(given, "hidden_size", where)
    model = validated_model(
        where,
        num_query_groups=given["num_key_value_heads"] or heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        moe_ffn_hidden_size=positive_int_field(given, "intermediate_size", where),
        **experts.router_fields(given, "num_local_experts", where),
        **llama.decoder_fields(given, where),
    )
    refuse_unknown_keys(config, {*_to_config(model), *_TRAINING_KEYS, "attention_bias"}, where)
    return model


ARCHITECTURE = HuggingFaceArchitecture(
    "mixtral",
    "MixtralForCausalLM",
    "Mixtral, llm-jp-3-8x13b",
    _requirements,
    _rules,
    _to_config,
    _from_config,
    ignored_keys=llama.ARCHITECTURE.ignored_keys,
)
