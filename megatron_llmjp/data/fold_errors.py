"""pydantic's errors in a fold file -> messages that name file, line and fold."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megatron_llmjp.data.fold_file import (
    Entry,
    Fold,
    FoldFile,
    FoldLearningRate,
    Skip,
    Source,
    ValidationSet,
)
from megatron_llmjp.errors import suggest
from megatron_llmjp.yaml_text import Written

READERS_KEYS = ("include", "root", "blends")
"""Keys of a fold file that the reader resolves."""


def describe(error: ValidationError, written: Written) -> str:
    """One line for each mistake."""
    return "\n".join(
        f"{written.where(tuple(e['loc']))}: {_describe(e, written.data)}" for e in _own(error)
    )


def _own(error: ValidationError) -> list[Any]:
    """Without pydantic's remark that a list with a wrong entry is too short."""
    errors = error.errors()
    inside = any(len(e["loc"]) > 1 for e in errors)
    return [e for e in errors if not (inside and e["type"] == "too_short")]


def _describe(error: Any, data: Any) -> str:
    """One mistake, with the fold's name instead of its number."""
    location: list[Any] = list(error["loc"])
    words = [str(part) for part in location]
    if len(location) > 1 and location[0] == "folds" and isinstance(location[1], int):
        entry = data["folds"][location[1]]
        name = entry.get("name", location[1] + 1) if isinstance(entry, dict) else location[1] + 1
        words = [f"fold '{name}'", *words[2:]]
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
    if error["type"] == "extra_forbidden":
        possible = _keys_beside(words)
        message = f"unknown key{suggest(words[-1], possible)} (possible: {', '.join(possible)})"
    return f"{', '.join(words) or 'the file'}: {message}"


def _keys_beside(words: list[str]) -> list[str]:
    """The keys that are known where an unknown one was found."""
    if len(words) == 1:
        return [*FoldFile.model_fields, *READERS_KEYS]
    model: type[Entry] = Fold if words[0].startswith("fold '") else ValidationSet
    if "blend" in words:
        model = Source
    elif "learning_rate" in words:
        model = FoldLearningRate
    elif words[0] == "skip":
        model = Skip
    return list(model.model_fields)
