"""Reading config.json of several transformers versions: where each keeps a value."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.errors import UserError


def required(config: dict[str, Any], key: str, where: str) -> int:
    """A whole number that has no safe default.

    Raises:
        UserError: it is missing or no positive whole number.
    """
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"{where}: {key} must be a positive whole number, found {value!r}")
    return value


def unsupported(where: str, **found: bool) -> None:
    """Refuse what the canonical model cannot represent.

    Raises:
        UserError: naming each key that is true.
    """
    names = [name for name, bad in found.items() if bad]
    if names:
        raise UserError(f"{where}: cannot be represented: {', '.join(names)}")


def rope_theta(config: dict[str, Any], where: str, legacy: str = "rope_theta") -> int:
    """Base of the rotary frequencies: ``rope_parameters`` in transformers 5, ``legacy`` before.

    Raises:
        UserError: the positions are scaled, or the base is no whole number.
    """
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    unsupported(where, **{f"rope scaling '{kind}'": kind != "default"})
    value = float(parameters.get("rope_theta", config.get(legacy, 10000.0)))
    unsupported(where, **{f"{legacy} {value} (not a whole number)": value != int(value)})
    return int(value)


def make_model(where: str, **fields: Any) -> ModelConfig:
    """A validated model.

    Raises:
        UserError: a value of config.json is impossible.
    """
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{where}: {first['loc'][0]} = {first['input']!r}: {first['msg']}"
        ) from None
