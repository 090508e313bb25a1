"""Which arguments of a Megatron checkpoint may be ignored: an allow-list over every field.

A field of ``args`` is one of four kinds:

- understood: :mod:`megatron_args` reads it;
- without influence on the trained function (:mod:`megatron_training_fields`), or belonging to a
  feature that is off (experts, latent attention, ...);
- a network option that the canonical model does not have: refused unless at a harmless value;
- unknown: refused unless it is unset or off (None, False, empty).

Source: megatron/core/transformer/transformer_config.py and megatron/training/arguments.py of
Megatron-LM, core 0.4 to 0.19 and main of August 2026; megatron/arguments.py of Megatron-DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_llmjp.convert.megatron_training_fields import is_training
from megatron_llmjp.errors import UserError

Fields = Mapping[str, Any]

_UNDERSTOOD = """
num_layers encoder_num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels
group_query_attention num_query_groups num_key_value_heads max_position_embeddings seq_length
position_embedding_type use_rotary_position_embeddings add_position_embedding rotary_base
rope_theta rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor
normalization norm_epsilon layernorm_epsilon swiglu gated_linear_unit bias_gelu_fusion openai_gelu
onnx_safe add_bias_linear add_qkv_bias untie_embeddings_and_output_weights hidden_dropout
attention_dropout init_method_std make_vocab_size_divisible_by vocab_size true_vocab_size
padded_vocab_size tokenizer_type use_legacy_models use_mcore_models
"""

UNDERSTOOD = frozenset(_UNDERSTOOD.split())
"""Fields that :mod:`megatron_args` reads."""

_OFF = (None, False)

HARMLESS: dict[str, tuple[Any, ...]] = {
    "activation_func": (None,),
    "activation_func_clamp_value": (None,),
    "apply_layernorm_1p": _OFF,
    "apply_residual_connection_post_layernorm": _OFF,
    "attention_output_gate": _OFF,
    "decoder_num_layers": (None,),
    "enable_gpt_oss": _OFF,
    "enable_hyper_connections": _OFF,
    "enable_mhc_connections": _OFF,
    "experimental_attention_variant": (None,),
    "export_num_eagle_layers": (None, 0),
    "export_num_medusa_heads": (None, 0),
    "export_num_mtp": (None, 0),
    "export_qk_l2_norm": _OFF,
    "glu_linear_offset": (None, 0.0),
    "head_wise_attn_gate": _OFF,
    "heterogeneous_block_specs": _OFF,
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "heterogeneous_layers_config_path": (None, ""),
    "hybrid_attention_ratio": (None, 0.0),
    "hybrid_layer_pattern": (None, ""),
    "hybrid_mlp_ratio": (None, 0.0),
    "hybrid_override_pattern": (None, ""),
    "is_hybrid_model": _OFF,
    "layernorm_zero_centered_gamma": _OFF,
    "linear_attention_freq": (None,),
    "linear_attention_type": (None,),
    "mlp_type": (None, "standard"),
    "model_spec": (None,),
    "mrope_interleaved": _OFF,
    "mrope_section": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": _OFF,
    "no_op": _OFF,
    "no_rope_freq": (None,),
    "num_experts": (None, 0, 1, [1]),
    "num_experts_switch": (None,),
    "num_moe_experts": (None, 0, 1),
    "per_block_parameters": (None,),
    "qk_l2_norm": _OFF,
    "qk_layernorm": _OFF,
    "quick_geglu": _OFF,
    "quick_gelu": _OFF,
    "replace_with_linear": _OFF,
    "retro_add_retriever": _OFF,
    "rope_type": (None, "rope"),
    "rotary_base_per_layer": (None,),
    "rotary_interleaved": _OFF,
    "softmax_scale": (None,),
    "softmax_type": (None, "vanilla"),
    "spec": (None,),
    "squared_relu": _OFF,
    "use_embedding_scaling": _OFF,
    "use_mup": _OFF,
    "window_size": (None, (-1, -1), (-1, 0), [-1, -1], [-1, 0]),
    "yaml_cfg": (None,),
}
"""Options that change the network, with the values at which they do not."""

_OWNERS: dict[str, tuple[str, ...]] = {
    "num_experts": ("moe_", "topk", "create_moe_param_group"),
    "multi_latent_attention": (
        *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        *("rotary_scaling_factor", "mscale", "beta_fast", "beta_slow", "cache_mla_latents"),
        *("original_max_position_embeddings", "mla_down_proj_fusion", "o_groups", "o_lora_rank"),
    ),
    "mtp_num_layers": ("mtp_", "freeze_base_for_mtp"),
    "experimental_attention_variant": (
        *("dsa_", "csa_", "linear_", "gdn_", "gdp_", "apply_dsa_kernel_fusion"),
        "experimental_attention_variant_",
    ),
    "is_hybrid_model": ("mamba_", "use_mamba_"),
    "use_mup": ("mup_",),
    "enable_hyper_connections": ("mhc_", "use_fused_mhc", "num_residual_streams"),
    "retro_add_retriever": ("retro_",),
    "window_size": ("window_attn_skip_freq",),
    "qk_clip": ("qk_clip",),
    "modelopt_enabled": ("export_",),
    "position_embedding_type": ("yarn_", "relative_attention_"),
}
"""Options that say nothing while the option before them is off. An owner that is on is refused
(``position_embedding_type`` when it is read); clipping of attention logits and quantization act on
weights in training, and leave no trace in the function."""

_APPROXIMATE_GELU = ("use_te_activation_func", "use_transformer_engine_op_fuser")
"""Transformer Engine's own GELU is the tanh approximation; its SwiGLU is the function itself."""


def check_fields(given: Fields, where: str, ignored: Collection[str] = ()) -> None:
    """Refuse arguments that this converter does not understand.

    Args:
        given: the arguments by name.
        where: the file, for messages.
        ignored: names that the user has declared to be irrelevant.

    Raises:
        UserError: naming every refused field with its value.
    """
    network = []
    unknown = []
    for name, value in sorted(given.items()):
        if name in ignored or name in UNDERSTOOD:
            continue
        kind = kind_of(name)
        if kind == "network" and not _is_harmless(name, value, given):
            network.append(f"{name} = {_shown(value)}")
        elif kind == "unknown" and not _is_off(value):
            unknown.append(f"{name} = {_shown(value)}")
    lines = []
    if network:
        lines.append(f"cannot be represented: {', '.join(network)}")
    if unknown:
        lines.append(
            f"unknown arguments: {', '.join(unknown)}; if they do not change the network, add "
            f"--ignore-args {','.join(item.partition(' ')[0] for item in unknown)}"
        )
    if lines:
        raise UserError(f"{where}: {'; '.join(lines)}")


def kind_of(name: str) -> str:
    """``understood``, ``network``, ``training`` (no influence on the function) or ``unknown``."""
    if name in UNDERSTOOD:
        return "understood"
    if name in HARMLESS or name in _APPROXIMATE_GELU:
        return "network"
    owned = any(name.startswith(prefixes) for prefixes in _OWNERS.values())
    return "training" if owned or is_training(name) else "unknown"


def _is_harmless(name: str, value: Any, given: Fields) -> bool:
    if name in _APPROXIMATE_GELU:
        return not value or bool(given.get("swiglu"))
    return any(_same(value, harmless) for harmless in HARMLESS[name])


def _same(value: Any, harmless: Any) -> bool:
    return type(value) in (type(harmless), int, float) and bool(value == harmless)


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
