"""The ``args`` of Megatron-LM and Megatron-DeepSpeed checkpoints: their command line, as parsed.

Source: megatron/training/arguments.py of Megatron-LM (core 0.6 to 0.12) and megatron/arguments.py
of Megatron-DeepSpeed. Both are covered by one reading: where names differ, each program lacks the
other's.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from pydantic import ValidationError

from megatron_llmjp.config.schema import SECTIONS, ModelConfig, OptimizerConfig
from megatron_llmjp.convert.hf_keys import make_model, unsupported
from megatron_llmjp.errors import UserError

_REFUSED = (
    "qk_layernorm",
    "multi_latent_attention",
    "mtp_num_layers",
    "rotary_interleaved",
    "squared_relu",
    "quick_gelu",
    "apply_layernorm_1p",
    "apply_residual_connection_post_layernorm",
    "heterogeneous_layers_config_path",
    "is_hybrid_model",
    "attention_output_gate",
    "window_size",
    "softmax_type",
    "use_alibi_position_embeddings",
)
"""Arguments that change the network in a way the canonical model does not have."""


def model_from_args(args: Any, where: str) -> ModelConfig:
    """The architecture that a program's arguments describe.

    Raises:
        UserError: an argument is missing, or asks for what cannot be represented.
    """
    if not hasattr(args, "num_layers") or not hasattr(args, "hidden_size"):
        raise UserError(f"{where}: its args name no num_layers and hidden_size")
    given = vars(args)
    _refuse(given, where)
    heads = given["num_attention_heads"]
    swiglu = bool(given.get("swiglu"))
    biases = bool(given.get("add_bias_linear", True))
    normalization = str(given.get("normalization") or "LayerNorm")
    rope = _is_rope(given, where)
    return make_model(
        where,
        num_layers=given["num_layers"],
        hidden_size=given["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=_groups(given),
        kv_channels=given.get("kv_channels") or given["hidden_size"] // heads,
        ffn_hidden_size=given.get("ffn_hidden_size") or 4 * given["hidden_size"],
        max_position_embeddings=given.get("max_position_embeddings") or given.get("seq_length"),
        position_embedding_type="rope" if rope else "learned_absolute",
        rotary_base=int(given.get("rotary_base") or 10000),  # Megatron-DeepSpeed has it fixed
        rotary_percent=float(given.get("rotary_percent") or 1.0) if rope else 1.0,
        rotary_seq_len_interpolation_factor=given.get("rotary_seq_len_interpolation_factor"),
        use_rope_scaling=bool(given.get("use_rope_scaling")),
        rope_scaling_factor=float(given.get("rope_scaling_factor") or 8.0),
        normalization="RMSNorm" if normalization.lower() == "rmsnorm" else "LayerNorm",
        norm_epsilon=given.get("norm_epsilon") or given.get("layernorm_epsilon") or 1e-5,
        activation_function="swiglu" if swiglu else _gelu(given, biases),
        add_bias_linear=biases,
        add_qkv_bias=bool(given.get("add_qkv_bias")),
        untie_embeddings_and_output_weights=bool(
            given.get("untie_embeddings_and_output_weights", False)
        ),
        hidden_dropout=given.get("hidden_dropout", 0.0),
        attention_dropout=given.get("attention_dropout", 0.0),
        init_method_std=given.get("init_method_std") or 0.02,
        make_vocab_size_divisible_by=given.get("make_vocab_size_divisible_by") or 128,
        vocab_size=true_vocabulary(args),
    )


_TOLD = {
    "data": ("tokenizer_type",),
    "training": ("global_batch_size", "micro_batch_size", "seed"),
    "optimizer": tuple(OptimizerConfig.model_fields),
}


def settings_from_args(args: Any) -> dict[str, dict[str, Any]]:
    """What a program's arguments say of data, batches and optimizer, by section.

    Values that this project's configuration does not know are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for section, names in _TOLD.items():
        for name in names:
            value = getattr(args, name, None)
            if value is None or isinstance(value, (dict, list)):
                continue
            try:
                SECTIONS[section].model_validate({name: value})
            except ValidationError:
                continue
            found.setdefault(section, {})[name] = value
    return found


def _refuse(given: dict[str, Any], where: str) -> None:
    found = {name: bool(given.get(name)) for name in _REFUSED}
    if given.get("softmax_type") == "vanilla":
        found["softmax_type"] = False
    experts = given.get("num_experts")
    found["num_experts"] = bool(experts) and experts != [1] and experts != 1
    swiglu_bias = bool(given.get("swiglu")) and bool(given.get("add_bias_linear", True))
    found["swiglu with add_bias_linear"] = swiglu_bias
    unsupported(where, **found)


def _is_rope(given: dict[str, Any], where: str) -> bool:
    """Megatron-LM says ``position_embedding_type``, Megatron-DeepSpeed has two switches."""
    kind = given.get("position_embedding_type")
    if given.get("use_rotary_position_embeddings") or kind == "rope":
        return True
    learned = kind == "learned_absolute" or (kind is None and given.get("add_position_embedding"))
    unsupported(where, **{f"position_embedding_type {kind}": not learned})
    return False


def _groups(given: dict[str, Any]) -> int:
    """Megatron-LM's ``num_query_groups`` is 1 and means nothing without the switch."""
    heads = int(given["num_attention_heads"])
    if "group_query_attention" in given:
        return int(given["num_query_groups"]) if given["group_query_attention"] else heads
    return int(given.get("num_key_value_heads") or heads)


def _gelu(given: dict[str, Any], biases: bool) -> str:
    """The fused kernel computes the tanh approximation; unfused is the exact function."""
    fused = bool(given.get("bias_gelu_fusion")) and biases
    return "gelu_tanh" if given.get("openai_gelu") or fused else "gelu"


def true_vocabulary(args: Any) -> int | None:
    """The vocabulary without padding, where the arguments tell it.

    NullTokenizer adds an end-of-document token to ``--vocab-size``; other tokenizers are not
    described by the arguments.
    """
    size = getattr(args, "vocab_size", None)
    if not isinstance(size, int):
        return None
    return size + 1 if getattr(args, "tokenizer_type", None) == "NullTokenizer" else size


def make_args(
    model: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    tensor: int,
    pipeline: int,
    extra: dict[str, Any],
) -> argparse.Namespace:
    """Arguments of plain types that describe a model to both programs.

    Args:
        rows: of the padded vocabulary.
        dtype: of the weights.
        tensor: tensor parallel size.
        pipeline: pipeline parallel size.
        extra: what only one of the programs knows.
    """
    rope = model.position_embedding_type == "rope"
    tanh = model.activation_function == "gelu_tanh"
    fields = {
        "num_layers": model.num_layers,
        "encoder_num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "kv_channels": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "seq_length": model.max_position_embeddings,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "rotary_percent": model.rotary_percent,
        "use_rotary_position_embeddings": rope,
        "add_bias_linear": model.add_bias_linear,
        "swiglu": model.activation_function == "swiglu",
        "bias_gelu_fusion": tanh,
        "openai_gelu": False,
        "onnx_safe": None,
        "squared_relu": False,
        "layernorm_epsilon": model.norm_epsilon,
        "norm_epsilon": model.norm_epsilon,
        "apply_layernorm_1p": False,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": False,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_method_std,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "data_parallel_size": 1,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return argparse.Namespace(**{**fields, **extra})
