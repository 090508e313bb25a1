"""Base class of the sections of a configuration."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base class of all sections: immutable, and an unknown key is an error.

    Values of ``Literal`` fields are case-insensitive: ``rmsnorm`` means ``RMSNorm``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _normalize_literals(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: cls._normalized(name, value) for name, value in values.items()}

    @classmethod
    def _normalized(cls, name: str, value: Any) -> Any:
        info = cls.model_fields.get(name)
        if info is None or not isinstance(value, str):
            return value
        kinds = (info.annotation, *get_args(info.annotation))
        words = {w for kind in kinds if get_origin(kind) is Literal for w in get_args(kind)}
        same = [word for word in words if str(word).lower() == value.lower()]
        return same[0] if same else value
