"""Parsed arguments (``args``) in checkpoints of Megatron-LM and Megatron-DeepSpeed.

Source: megatron/training/arguments.py of Megatron-LM (core 0.6 to 0.12) and megatron/arguments.py
of Megatron-DeepSpeed. One function reads both: if the names of an argument differ, neither program
has the name of the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from megatron_llmjp.config.schema import SECTIONS, ModelConfig, OptimizerConfig
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.formats.base import TRAINING_FIELDS, SourceCheckpoint
from megatron_llmjp.convert.formats.hugging_face.config import (
    positive_int_field,
    refuse_unsupported,
    validated_model,
)
from megatron_llmjp.convert.formats.megatron_lm.argument_fields import (
    check_fields,
    is_training_only,
)
from megatron_llmjp.convert.formats.megatron_lm.expert_arguments import expert_fields
from megatron_llmjp.tokenizers.base import TikTokenSettings

_CONVERTED_FIELDS = {
    "data": ("tokenizer_type",),
    "training": TRAINING_FIELDS,
    "optimizer": tuple(OptimizerConfig.model_fields),
}


def model_from_args(args: Any, where: str, ignored: Collection[str] = ()) -> ModelConfig:
    """Return the model that the arguments describe.

    Args:
        args: the namespace of the checkpoint.
        where: the file, for messages.
        ignored: names of arguments to ignore.

    Raises:
        UserError: an argument is missing, unknown, or sets an option that is not supported.
    """
    given = {name: value for name, value in _fields(args).items() if name not in ignored}
    check_fields(given, where)
    _check_consistent(given, where)
    heads = positive_int_field(given, "num_attention_heads", where)
    hidden = positive_int_field(given, "hidden_size", where)
    swiglu = bool(given.get("swiglu"))
    biases = bool(given.get("add_bias_linear", True))
    rope = _is_rope(given, where)
    return validated_model(
        where,
        num_layers=positive_int_field(given, "num_layers", where),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=_groups(given, heads, where),
        kv_channels=given.get("kv_channels") or hidden // heads,
        ffn_hidden_size=given.get("ffn_hidden_size") or 4 * hidden,
        max_position_embeddings=given.get("max_position_embeddings") or given.get("seq_length"),
        position_embedding_type="rope" if rope else "learned_absolute",
        rotary_base=_rotary_base(given, where),
        rotary_percent=(given.get("rotary_percent") or 1.0) if rope else 1.0,
        rotary_seq_len_interpolation_factor=given.get("rotary_seq_len_interpolation_factor"),
        use_rope_scaling=bool(given.get("use_rope_scaling")),
        rope_scaling_factor=given.get("rope_scaling_factor") or 8.0,
        normalization=_normalization(given, where),
        norm_epsilon=given.get("norm_epsilon") or given.get("layernorm_epsilon") or 1e-5,
        activation_function="swiglu" if swiglu else _gelu(given, biases),
        add_bias_linear=biases,
        add_qkv_bias=bool(given.get("add_qkv_bias")),
        qk_layernorm=bool(given.get("qk_layernorm")),
        untie_embeddings_and_output_weights=bool(
            given.get("untie_embeddings_and_output_weights", False)
        ),
        hidden_dropout=given.get("hidden_dropout", 0.0),
        attention_dropout=given.get("attention_dropout", 0.0),
        init_method_std=given.get("init_method_std") or 0.02,
        make_vocab_size_divisible_by=given.get("make_vocab_size_divisible_by") or 128,
        vocab_size=true_vocab_size(args),
        **expert_fields(given, where, _is_core(given)),
    )


def notes_from_args(args: Any) -> list[str]:
    """Return notes on arguments that Megatron-LM accepts but does not pass to the model."""
    given = _fields(args)
    if not _is_core(given):
        return []
    unpassed = {
        "rope_scaling_factor": bool(given.get("use_rope_scaling"))
        and given.get("rope_scaling_factor") not in (None, 8.0),
        "rotary_seq_len_interpolation_factor": given.get("rotary_seq_len_interpolation_factor")
        not in (None, 1),
    }
    return [
        f"{name} {given[name]} is converted as part of the model; pretrain_gpt.py of Megatron-LM "
        f"up to core 0.19 does not pass it to the model: if the run was trained without it, add "
        f"--ignore-args {name}"
        for name, found in unpassed.items()
        if found
    ]


def vocabulary_notes(model: ModelConfig) -> list[str]:
    """Return a note if the checkpoint does not contain the true vocabulary size."""
    if model.vocab_size is not None:
        return []
    return [
        "the true vocabulary size is not in the checkpoint: its padding was kept; "
        "--vocab-size N trims it"
    ]


def _fields(args: Any) -> dict[str, Any]:
    return dict(vars(args)) if hasattr(args, "__dict__") else {}


def settings_from_args(args: Any) -> dict[str, dict[str, Any]]:
    """Return settings of data, batches and optimizer in the arguments, by section.

    Values that are not valid in this project's configuration are omitted.
    """
    found: dict[str, dict[str, Any]] = {}
    for section, names in _CONVERTED_FIELDS.items():
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


def tokenizer_type_of(args: Any) -> str | None:
    """Return ``tokenizer_type``, or None if it is not set."""
    name = getattr(args, "tokenizer_type", None)
    return name if isinstance(name, str) and name else None


def tiktoken_of(args: Any) -> TikTokenSettings:
    """Return the settings of TikTokenizer, with defaults for unset arguments."""
    default = TikTokenSettings()
    return TikTokenSettings(
        getattr(args, "tiktoken_pattern", None) or default.pattern,
        getattr(args, "tiktoken_num_special_tokens", None) or default.num_special_tokens,
        tuple(getattr(args, "tiktoken_special_tokens", None) or default.special_tokens),
    )


def _is_core(given: dict[str, Any]) -> bool:
    """Return whether the run used megatron-core's model, not that of ``megatron.legacy``."""
    if "use_legacy_models" in given:
        return not given["use_legacy_models"]
    return bool(given.get("use_mcore_models"))


def _check_consistent(given: dict[str, Any], where: str) -> None:
    """Refuse contradicting arguments and unsupported combinations."""
    swiglu = bool(given.get("swiglu"))
    layers = given.get("encoder_num_layers")
    epsilons = [given[name] for name in ("norm_epsilon", "layernorm_epsilon") if given.get(name)]
    refuse_unsupported(
        where,
        **{
            "gated_linear_unit without swiglu": bool(given.get("gated_linear_unit")) and not swiglu,
            f"encoder_num_layers {layers}": layers not in (None, given.get("num_layers")),
            "norm_epsilon and layernorm_epsilon that differ": len(set(epsilons)) > 1,
        },
    )


def _is_rope(given: dict[str, Any], where: str) -> bool:
    """Read ``position_embedding_type`` of Megatron-LM, or the two flags of Megatron-DeepSpeed."""
    kind = given.get("position_embedding_type")
    known = (None, "rope", "learned_absolute")
    refuse_unsupported(where, **{f"position_embedding_type {kind}": kind not in known})
    if given.get("use_rotary_position_embeddings") or kind == "rope":
        return True
    added = bool(given.get("add_position_embedding", True))
    refuse_unsupported(where, **{"a model without position embeddings": not added})
    return False


def _rotary_base(given: dict[str, Any], where: str) -> int:
    """Return ``rotary_base``, which is ``rope_theta`` in LLM-jp's branches of 2024.

    They pass it to megatron-core's model only; in their legacy model, as in Megatron-DeepSpeed, the
    base is the constant 10000.
    """
    base = given.get("rotary_base") or 10000
    theta = given.get("rope_theta")
    if theta is None:
        theta = base
    refuse_unsupported(
        where,
        **{
            f"rope_theta {theta} with rotary_base {base}": base not in (10000, theta),
            f"rope_theta {theta} in a legacy model (not megatron-core's)": theta != base
            and not _is_core(given),
            f"rotary base {theta} (not an integer)": not _is_whole(theta),
        },
    )
    return int(theta)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and value == value // 1


def _normalization(given: dict[str, Any], where: str) -> str:
    """Normalize the spelling: ``RMSNorm`` in Megatron-LM, ``rmsnorm`` in Megatron-DeepSpeed."""
    name = str(given.get("normalization") or "LayerNorm")
    known = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
    refuse_unsupported(where, **{f"normalization {name}": name.lower() not in known})
    return known[name.lower()]


def _groups(given: dict[str, Any], heads: int, where: str) -> int:
    """Return the query groups; without ``group_query_attention`` one per head."""
    if "group_query_attention" in given:
        grouped = given["group_query_attention"]
        return positive_int_field(given, "num_query_groups", where) if grouped else heads
    return given.get("num_key_value_heads") or heads


def _gelu(given: dict[str, Any], biases: bool) -> str:
    """Return the GELU variant: the fused kernel is the tanh approximation, unfused is exact.

    megatron-core's model ignores ``openai_gelu`` and ``onnx_safe``; in the legacy model they take
    precedence over the fused kernel.
    """
    if not _is_core(given):
        if given.get("openai_gelu"):
            return "gelu_tanh"
        if given.get("onnx_safe"):
            return "gelu"
    return "gelu_tanh" if given.get("bias_gelu_fusion") and biases else "gelu"


def true_vocab_size(args: Any) -> int | None:
    """Return the vocabulary size without padding, or None if the arguments do not contain it.

    ``vocab_size`` is exact for NullTokenizer only, which adds an end-of-document token up to core
    0.17 and includes it from 0.18 on (where its id is an argument); for other tokenizers it is at
    most an upper bound. This converter writes ``true_vocab_size``.
    """
    true = getattr(args, "true_vocab_size", None)
    if isinstance(true, int):
        return true
    size = getattr(args, "vocab_size", None)
    null = getattr(args, "tokenizer_type", None) == "NullTokenizer"
    if not null or not isinstance(size, int):
        return None
    return size if hasattr(args, "null_tokenizer_eod_id") else size + 1


def run_arguments(source: SourceCheckpoint) -> dict[str, Any]:
    """Return the arguments for batch sizes, seed, schedule, tokenizer and vocabulary.

    As far as the source has them. NullTokenizer adds its end-of-document token to ``vocab_size``.
    """
    found = {
        name: value
        for section in ("training", "optimizer")
        for name, value in source.settings.get(section, {}).items()
        if value is not None and is_training_only(name)
    }
    vocabulary = source.model.vocab_size
    if source.seq_length is not None:
        found["seq_length"] = source.seq_length
    if source.tokenizer_type is not None:
        found["tokenizer_type"] = source.tokenizer_type
    if vocabulary is not None:
        found["true_vocab_size"] = vocabulary
        if source.tokenizer_type == "NullTokenizer":
            found["vocab_size"] = vocabulary - 1
    return found


def make_args(
    model: ModelConfig,
    rows: int,
    dtype: DType,
    tensor: int,
    pipeline: int,
    extra: dict[str, Any],
) -> argparse.Namespace:
    """Return arguments of built-in types that describe a model to both programs.

    Args:
        model: the model.
        rows: padded vocabulary size.
        dtype: of the weights.
        tensor: tensor parallel size.
        pipeline: pipeline parallel size.
        extra: arguments of one program only; they take precedence.
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
        "bf16": dtype == DType.bfloat16,
        "fp16": dtype == DType.float16,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return argparse.Namespace(**{**fields, **extra})
