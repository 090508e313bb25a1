"""Base of all sections of a configuration."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error.

    A choice among words is accepted in upper and lower case: ``rmsnorm`` is ``RMSNorm``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _spell_choices(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: cls._spelled(name, value) for name, value in values.items()}

    @classmethod
    def _spelled(cls, name: str, value: Any) -> Any:
        info = cls.model_fields.get(name)
        if info is None or not isinstance(value, str):
            return value
        kinds = (info.annotation, *get_args(info.annotation))
        words = {w for kind in kinds if get_origin(kind) is Literal for w in get_args(kind)}
        same = [word for word in words if str(word).lower() == value.lower()]
        return same[0] if same else value
