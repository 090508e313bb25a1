"""JSON files and the keys of ``config.json`` that several Hugging Face architectures share.

The keys are read and written as transformers 4.35 to 5 store them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, as UTF-8."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file: indented, UTF-8."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def positive_int_field(config: dict[str, Any], key: str, where: str) -> int:
    """Return a field that has no safe default.

    Raises:
        UserError: it is missing or not a positive integer.
    """
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"{where}: {key} must be a positive integer, found {value!r}")
    return value


def refuse_unsupported(where: str, **found: bool) -> None:
    """Refuse features that the canonical model does not have.

    Raises:
        UserError: naming each feature whose value is true.
    """
    names = [name for name, is_used in found.items() if is_used]
    if names:
        raise UserError(f"{where}: not supported: {', '.join(names)}")


GELU_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
"""Names in Hugging Face of the exact GELU and of its tanh approximation."""

_GELUS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def layer_norm_gelu_fields(
    config: dict[str, Any], key: str, default: str, where: str
) -> dict[str, Any]:
    """Return model fields of GPT-2 and GPT-NeoX: LayerNorm, biases, and a GELU.

    Args:
        config: the content of config.json.
        key: the key of the activation's name.
        default: the name if the key is missing.
        where: the file, for messages.

    Raises:
        UserError: the activation is not a GELU.
    """
    name = config.get(key, default)
    refuse_unsupported(where, **{f"{key} '{name}'": name not in _GELUS})
    return {
        "normalization": "LayerNorm",
        "activation_function": _GELUS[name],
        "add_bias_linear": True,
    }


def layer_norm_gelu_requirements(model: ModelConfig) -> dict[str, bool]:
    """Return requirements of GPT-2 and GPT-NeoX (see ``HuggingFaceArchitecture``)."""
    heads = model.num_attention_heads
    return {
        f"normalization {model.normalization}": model.normalization == "LayerNorm",
        "activation swiglu": model.activation_function in GELU_NAMES,
        "linear layers without biases": model.add_bias_linear,
        f"{model.query_groups} query groups of {heads} heads": model.query_groups == heads,
        f"heads of size {model.head_dim}": model.head_dim * heads == model.hidden_size,
        "qk_layernorm": not model.qk_layernorm,
    }


def embedding_fields(config: dict[str, Any], where: str, tied: bool) -> dict[str, Any]:
    """Return the model fields of the embedding; ``tied`` is the default of the class."""
    return {
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", tied),
        "init_method_std": config.get("initializer_range", 0.02),
        "vocab_size": positive_int_field(config, "vocab_size", where),
    }


ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Types of RoPE scaling in transformers that megatron-core supports."""

_ORIGINAL_LENGTH = "original_max_position_embeddings"

LLAMA3_FIELDS = {
    "low_freq_factor": "rope_scaling_low_freq_factor",
    "high_freq_factor": "rope_scaling_high_freq_factor",
    "original_max_position_embeddings": "rope_scaling_original_max_position_embeddings",
}
"""Constants of LLaMA 3.1's scaling: keys in transformers, and fields of the model."""


def rope_parameters(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return ``rope_parameters``, the RoPE settings of transformers 5.

    ``rope_scaling``, its name in transformers 4, takes precedence if both exist: context lengths
    are usually extended by editing that key.

    Raises:
        UserError: it is not a dictionary, or has one dictionary per type of layer.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = isinstance(given, dict) and any(isinstance(v, dict) for v in given.values())
    if not isinstance(given, dict) or nested:
        raise UserError(f"{where}: unknown form of RoPE parameters: {given!r}")
    return given


def rope_fields(config: dict[str, Any], where: str, legacy: str = "rope_theta") -> dict[str, Any]:
    """Return the base and scaling of the rotary frequencies as model fields.

    They are resolved as in transformers 5 (``convert_rope_params_to_dict`` of
    modeling_rope_utils.py).

    Args:
        config: the content of config.json.
        where: the file, for messages.
        legacy: the key of the base if the dictionary has none.

    Raises:
        UserError: megatron-core does not support the scaling, or the base is not an integer.
    """
    scaling = rope_parameters(config, where)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    value = finite_number(scaling.get("rope_theta", config.get(legacy, 10000.0)), legacy, where)
    factor = finite_number(scaling.get("factor", 1.0), "the factor of rope_scaling", where)
    refuse_unsupported(
        where,
        **{
            f"rope scaling '{kind}'": kind not in ROPE_TYPES,
            f"{legacy} {value} (not an integer)": value != value // 1,
            f"linear rope scaling by {factor} (not an integer)": kind == "linear"
            and factor != factor // 1,
        },
    )
    fields: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": int(value)}
    if kind == "linear":
        fields["rotary_seq_len_interpolation_factor"] = int(factor)
    elif kind == "llama3":
        fields |= {"use_rope_scaling": True, "rope_scaling_factor": factor}
        fields |= _llama3_constants(config, scaling, where)
    elif kind == "yarn":
        fields |= _yarn_fields(config, scaling, factor, where)
    return fields


def _llama3_constants(
    config: dict[str, Any], scaling: dict[str, Any], where: str
) -> dict[str, float]:
    length = config.get("max_position_embeddings", 2048)
    given = {"original_max_position_embeddings": length, **scaling}
    found = {
        key: finite_number(given.get(key), f"{key} of rope_scaling", where) for key in LLAMA3_FIELDS
    }
    low, high, original = found.values()
    refuse_unsupported(
        where,
        **{
            f"llama3 rope scaling with low_freq_factor {low} and high_freq_factor {high}": not (
                0 < low < high
            ),
            f"llama3 rope scaling with original_max_position_embeddings {original}": original < 1
            or original != original // 1,
        },
    )
    return {LLAMA3_FIELDS[key]: value for key, value in found.items()}


YARN_FIELDS = {
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
    "truncate": "yarn_correction_range_round_to_int",
}
"""YaRN's settings except the factor: keys in transformers, and fields of the model."""


def _yarn_fields(
    config: dict[str, Any], scaling: dict[str, Any], factor: float, where: str
) -> dict[str, Any]:
    """Return the fields as ``_compute_yarn_parameters`` of modeling_rope_utils.py does."""
    length = scaling.get("original_max_position_embeddings")
    length = config.get("max_position_embeddings", 2048) if length is None else length
    given = {
        "original_max_position_embeddings": length,
        "beta_fast": scaling.get("beta_fast") or 32.0,
        "beta_slow": scaling.get("beta_slow") or 1.0,
    }
    scales = [scaling.get(key) for key in ("mscale", "mscale_all_dim")]
    if all(scales):  # one alone has no effect
        given |= dict(zip(("mscale", "mscale_all_dim"), scales, strict=True))
    found = {
        YARN_FIELDS[k]: finite_number(value, f"{k} of rope_scaling", where)
        for k, value in given.items()
    }
    truncate = scaling.get("truncate", True)
    refuse_unsupported(
        where,
        **{
            "yarn rope scaling with attention_factor": scaling.get("attention_factor") is not None,
            f"yarn rope scaling by {factor}": factor < 1.0,
            f"yarn rope scaling with truncate {truncate!r}": not isinstance(truncate, bool),
        },
    )
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": factor,
        YARN_FIELDS["truncate"]: truncate,
        **found,
    }


def finite_number(value: Any, what: str, where: str) -> float:
    """Return a finite number of a JSON file.

    Args:
        value: the number.
        what: its name, for messages.
        where: the file, for messages.

    Raises:
        UserError: it is not a number, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
        raise UserError(f"{where}: {what} must be a number, found {value!r}")
    return float(value)


def rope_keys(model: ModelConfig, legacy: str = "rope_theta", **more: Any) -> dict[str, Any]:
    """Return the inverse of :func:`rope_fields`: keys that transformers 4.35 to 5 read.

    Up to 4.42, ``rope_scaling`` has only ``type`` and a ``factor`` of type float, and llama3 is not
    supported; from 4.43 on, ``rope_type`` takes precedence over ``type``.

    Args:
        model: the architecture.
        legacy: the key of the base before transformers 5.
        more: further entries of ``rope_parameters``.
    """
    base = float(model.rotary_base) if legacy == "rope_theta" else model.rotary_base
    scaling: dict[str, Any] | None = None
    original: dict[str, Any] = {}
    parameters: dict[str, Any] = {"rope_type": "default"}
    if model.use_rope_scaling:
        constants = {key: getattr(model, field) for key, field in LLAMA3_FIELDS.items()}
        parameters = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **constants}
        scaling = {"type": "llama3", **parameters}
        original = {_ORIGINAL_LENGTH: constants[_ORIGINAL_LENGTH]}
    elif model.position_embedding_type == "yarn":
        settings = {key: getattr(model, field) for key, field in YARN_FIELDS.items()}
        settings = {key: value for key, value in settings.items() if value is not None}
        parameters = {"rope_type": "yarn", "factor": model.yarn_rotary_scaling_factor, **settings}
        scaling = {"type": "yarn", **parameters}
    elif model.rotary_seq_len_interpolation_factor is not None:
        factor = float(model.rotary_seq_len_interpolation_factor)
        parameters = {"rope_type": "linear", "factor": factor}
        scaling = {"type": "linear", "factor": factor}
    return {
        legacy: base,
        **original,  # llama.cpp's converter reads it here
        "rope_scaling": scaling,
        "rope_parameters": {**parameters, "rope_theta": float(base), **more},
    }


def rope_warnings(model: ModelConfig) -> list[str]:
    """Return warnings on rotary settings that some versions of transformers read otherwise."""
    original, factor = model.yarn_original_max_position_embeddings, model.yarn_rotary_scaling_factor
    longest = model.max_position_embeddings
    if model.position_embedding_type != "yarn" or longest in (None, factor * original):
        return []
    return [
        f"max_position_embeddings {longest} is not yarn_rotary_scaling_factor {factor:g} x "
        f"yarn_original_max_position_embeddings {original}: transformers 4.51 to 4.55 scale by "
        "their ratio instead of the factor; 4.56 and newer by the factor"
    ]


def rope_requirements(model: ModelConfig) -> dict[str, bool]:
    """Return requirements on rotary embeddings (see ``HuggingFaceArchitecture``)."""
    both = model.use_rope_scaling and model.rotary_seq_len_interpolation_factor is not None
    return {"use_rope_scaling with rotary_seq_len_interpolation_factor": not both}


_MAX_LAYERS = 10_000


def validated_model(where: str, **fields: Any) -> ModelConfig:
    """Return a model configuration.

    Raises:
        UserError: a value is not valid.
    """
    if isinstance(fields["num_layers"], int) and fields["num_layers"] > _MAX_LAYERS:
        raise UserError(
            f"{where}: {fields['num_layers']} layers, at most {_MAX_LAYERS} are supported; "
            "is the file damaged?"
        )
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{where}: {first['loc'][0]} = {first['input']!r}: {first['msg']}"
        ) from None
