"""Qwen3MoeForCausalLM: Qwen3 with experts in all or some layers, as in llm-jp-4-32b-a3b.

Source of names and keys: transformers, models/qwen3_moe/modeling_qwen3_moe.py and
configuration_qwen3_moe.py (4.51 and 5.x); conversion_mapping.py of 5.x, which joins the stored
tensors of the experts.
"""

from __future__ import annotations

from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.architectures import experts, llama, qwen3
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
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
_NUMBER_KEYS = ("num_experts", "num_local_experts")
"""Keys of the number of experts in transformers 4 and 5."""
_OTHER_KEYS = ("sliding_window", "max_window_layers", "mlp_only_layers", "layer_types")


def _rules(model: ModelConfig) -> list[TensorRule]:
    return [
        *llama.attention_rules(model),
        *qwen3.head_norm_rules(),
        *experts.expert_rules("mlp", "gate_proj", "up_proj", "down_proj"),
        *llama.feed_forward_rules(),
    ]


def _requirements(model: ModelConfig) -> dict[str, bool]:
    return {**qwen3.head_norm_requirements(model), **experts.expert_requirements(model)}


def _to_config(model: ModelConfig) -> dict[str, Any]:
    dense = [i for i, has_experts in enumerate(model.expert_layers) if not has_experts]
    return {
        **qwen3.to_config(model),
        **dict.fromkeys(_NUMBER_KEYS, model.num_moe_experts),
        "moe_intermediate_size": model.expert_ffn_size,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        **experts.router_keys(model),
    }


def _expert_layers(config: dict[str, Any], where: str) -> int | tuple[int, ...]:
    """Return ``moe_layer_freq``, as ``Qwen3MoeDecoderLayer`` chooses the layers with experts."""
    step = positive_int_field(config, "decoder_sparse_step", where)
    dense = config.get("mlp_only_layers") or ()
    layers = range(positive_int_field(config, "num_hidden_layers", where))
    found = tuple(int(i not in dense and (i + 1) % step == 0) for i in layers)
    refuse_unsupported(where, **{"num_experts without a layer that has experts": not any(found)})
    return 1 if all(found) else found


def _from_config(config: dict[str, Any], where: str) -> ModelConfig:
    qwen3.refuse_windows(config, where)
    numbers = {key: config[key] for key in _NUMBER_KEYS if config.get(key) is not None}
    refuse_unsupported(
        where,
        **{
            " and ".join(f"{key} {value}" for key, value in numbers.items()): (
                len(set(numbers.values())) > 1
            )
        },
    )
    given = {**_DEFAULTS, **config}
    if numbers:
        given["num_experts"] = next(iter(numbers.values()))
    heads = positive_int_field(given, "num_attention_heads", where)
    hidden = positive_int_field(given, "hidden_size", where)
    model = validated_model(
        where,
        num_query_groups=given["num_key_value_heads"] or heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        qk_layernorm=True,
        moe_layer_freq=_expert_layers(given, where),
        moe_ffn_hidden_size=positive_int_field(given, "moe_intermediate_size", where),
        moe_router_pre_softmax=not given["norm_topk_prob"],
        **experts.router_fields(given, "num_experts", where),
        **llama.decoder_fields(given, where),
    )
    refuse_unknown_keys(config, {*_to_config(model), *_OTHER_KEYS}, where)
    return model


ARCHITECTURE = HuggingFaceArchitecture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "Qwen3-MoE, llm-jp-4-32b-a3b",
    _requirements,
    _rules,
    _to_config,
    _from_config,
    ignored_keys=llama.ARCHITECTURE.ignored_keys,
)
