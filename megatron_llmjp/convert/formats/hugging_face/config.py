"""``config.json`` of Hugging Face models: its keys, by transformers version and model.

JSON objects in files.

Reading config.json of several transformers versions: where each keeps a value.

What an architecture of Hugging Face must say of itself to be read and written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.tensors import LAYER, Layout, tensor_shapes
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
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, as UTF-8."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return a JSON object as a file holds it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def positive_int_field(config: dict[str, Any], key: str, where: str) -> int:
    """A whole number that has no safe default.

    Raises:
        UserError: it is missing or no positive whole number.
    """
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"{where}: {key} must be a positive whole number, found {value!r}")
    return value


def refuse_unsupported(where: str, **found: bool) -> None:
    """Refuse what the canonical model cannot represent.

    Raises:
        UserError: naming each key that is true.
    """
    names = [name for name, bad in found.items() if bad]
    if names:
        raise UserError(f"{where}: cannot be represented: {', '.join(names)}")


GELU_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
"""What Hugging Face calls the exact GELU and its tanh approximation."""

_GELUS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def layer_norm_gelu_fields(
    config: dict[str, Any], key: str, default: str, where: str
) -> dict[str, Any]:
    """What GPT-2 and GPT-NeoX share: LayerNorm, biases, and a GELU that ``key`` names.

    Raises:
        UserError: the activation is another one.
    """
    name = config.get(key, default)
    refuse_unsupported(where, **{f"{key} '{name}'": name not in _GELUS})
    return {
        "normalization": "LayerNorm",
        "activation_function": _GELUS[name],
        "add_bias_linear": True,
    }


def layer_norm_gelu_requirements(model: ModelConfig) -> dict[str, bool]:
    """What GPT-2 and GPT-NeoX demand of a model, as true of one that they can hold."""
    heads = model.num_attention_heads
    return {
        f"normalization {model.normalization}": model.normalization == "LayerNorm",
        "activation swiglu": model.activation_function in GELU_NAMES,
        "linear layers without biases": model.add_bias_linear,
        f"{model.query_groups} query groups of {heads} heads": model.query_groups == heads,
        f"heads of size {model.head_dim}": model.head_dim * heads == model.hidden_size,
    }


def embedding_fields(config: dict[str, Any], where: str, tied: bool) -> dict[str, Any]:
    """The embedding of every architecture; ``tied`` is its class's default."""
    return {
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", tied),
        "init_method_std": config.get("initializer_range", 0.02),
        "vocab_size": positive_int_field(config, "vocab_size", where),
    }


ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary scalings of transformers that megatron-core has."""

LLAMA3_FIELDS = {
    "low_freq_factor": "rope_scaling_low_freq_factor",
    "high_freq_factor": "rope_scaling_high_freq_factor",
    "original_max_position_embeddings": "rope_scaling_original_max_position_embeddings",
}
"""The constants of LLaMA 3.1's scaling in transformers, and the fields of the model."""


def rope_parameters(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The dictionary of rotary parameters that transformers 5 takes.

    ``rope_scaling``, its name in transformers 4, wins where both are given: whoever extends a
    context by editing the file writes that one.

    Raises:
        UserError: it is no dictionary, or one for each kind of layer.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = isinstance(given, dict) and any(isinstance(v, dict) for v in given.values())
    if not isinstance(given, dict) or nested:
        raise UserError(f"{where}: rotary parameters of a form that is not known: {given!r}")
    return given


def rope_fields(config: dict[str, Any], where: str, legacy: str = "rope_theta") -> dict[str, Any]:
    """Base and scaling of the rotary frequencies, as fields of the model.

    Resolved as transformers 5 does (modeling_rope_utils.py, ``convert_rope_params_to_dict``).

    Args:
        config: the content of config.json.
        where: the file, for messages.
        legacy: the key of the base where the dictionary has none.

    Raises:
        UserError: the positions are scaled in a way that megatron-core has not, or the base is no
            whole number.
    """
    scaling = rope_parameters(config, where)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    value = finite_number(scaling.get("rope_theta", config.get(legacy, 10000.0)), legacy, where)
    factor = finite_number(scaling.get("factor", 1.0), "the factor of rope_scaling", where)
    refuse_unsupported(
        where,
        **{
            f"rope scaling '{kind}'": kind not in ROPE_TYPES,
            f"{legacy} {value} (not a whole number)": value != value // 1,
            f"linear rope scaling by {factor} (not a whole number)": kind == "linear"
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
"""YaRN's settings in transformers beside the factor, and the fields of the model."""


def _yarn_fields(
    config: dict[str, Any], scaling: dict[str, Any], factor: float, where: str
) -> dict[str, Any]:
    """As modeling_rope_utils.py of transformers, ``_compute_yarn_parameters``."""
    length = scaling.get("original_max_position_embeddings")
    length = config.get("max_position_embeddings", 2048) if length is None else length
    given = {
        "original_max_position_embeddings": length,
        "beta_fast": scaling.get("beta_fast") or 32.0,
        "beta_slow": scaling.get("beta_slow") or 1.0,
    }
    scales = [scaling.get(key) for key in ("mscale", "mscale_all_dim")]
    if all(scales):  # one alone means nothing
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
    """A finite number of a JSON file.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
        raise UserError(f"{where}: {what} must be a number, found {value!r}")
    return float(value)


def rope_keys(model: ModelConfig, legacy: str = "rope_theta", **more: Any) -> dict[str, Any]:
    """The inverse of :func:`rope_fields`: keys that transformers 4.35 to 5 read.

    Up to 4.42 ``rope_scaling`` is ``type`` and a ``factor`` of type float, nothing else, and llama3
    is not known; from 4.43 on ``rope_type`` is read, else ``type``.

    Args:
        model: the architecture.
        legacy: the key of the base before transformers 5.
        more: further entries of ``rope_parameters``.
    """
    base = float(model.rotary_base) if legacy == "rope_theta" else model.rotary_base
    scaling: dict[str, Any] | None = None
    parameters: dict[str, Any] = {"rope_type": "default"}
    if model.use_rope_scaling:
        constants = {key: getattr(model, field) for key, field in LLAMA3_FIELDS.items()}
        parameters = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **constants}
        scaling = {"type": "llama3", **parameters}
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
        "rope_scaling": scaling,
        "rope_parameters": {**parameters, "rope_theta": float(base), **more},
    }


def rope_requirements(model: ModelConfig) -> dict[str, bool]:
    """What Hugging Face cannot hold of a model's rotary positions, as true of a model it can."""
    both = model.use_rope_scaling and model.rotary_seq_len_interpolation_factor is not None
    return {"use_rope_scaling with rotary_seq_len_interpolation_factor": not both}


_MOST_LAYERS = 10_000


def validated_model(where: str, **fields: Any) -> ModelConfig:
    """A validated model.

    Raises:
        UserError: a value of config.json is impossible.
    """
    if isinstance(fields["num_layers"], int) and fields["num_layers"] > _MOST_LAYERS:
        raise UserError(f"{where}: {fields['num_layers']} layers: damaged?")
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{where}: {first['loc'][0]} = {first['input']!r}: {first['msg']}"
        ) from None


class TensorRule(NamedTuple):
    """A canonical tensor, the keys of its parts, and how it is cut into them."""

    name: str
    keys: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class HuggingFaceArchitecture:
    """One architecture of Hugging Face.

    Attributes:
        refusals: why a model cannot be held, one line each; none when it can.
        rules: the table of names; ``{i}`` is the layer.
        to_config: the architecture's keys of config.json; model to dictionary.
        from_config: the inverse; raises UserError for what cannot be represented.
        ignored: keys of older files that hold no parameters.
    """

    model_type: str
    architecture: str
    refusals: Callable[[ModelConfig], list[str]]
    rules: Callable[[ModelConfig], list[TensorRule]]
    to_config: Callable[[ModelConfig], dict[str, Any]]
    from_config: Callable[[dict[str, Any], str], ModelConfig]
    ignored: re.Pattern[str]

    def expanded(self, model: ModelConfig) -> list[TensorRule]:
        """The rules of every layer, in canonical order, without those the model lacks."""
        names = tensor_shapes(model, 1)
        mark = LAYER.format(i="{i}")
        table = {rule.name: rule for rule in self.rules(model)}
        found = []
        for name in names:
            layer = re.fullmatch(re.escape(mark).replace(r"\{i\}", r"(\d+)") + "(.*)", name)
            rule = table[mark + layer[2] if layer else name]
            i = layer[1] if layer else ""
            found.append(TensorRule(name, tuple(key.format(i=i) for key in rule.keys), rule.layout))
        return found
