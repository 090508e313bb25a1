"""Reading fold files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_llmjp.data.fold_file import Entry, Fold, FoldFile, Source, ValidationSet
from megatron_llmjp.errors import UserError, suggest


def read_fold_file(path: Path) -> FoldFile:
    """Read a fold file; dataset paths become relative to the caller's folder.

    Raises:
        UserError: with every mistake and where it is.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"fold file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        parsed = FoldFile.model_validate(data)
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{path}: {_describe(e, data)}" for e in _own_errors(error))
        ) from None
    return _relative_to(parsed, path.parent)


def _relative_to(file: FoldFile, folder: Path) -> FoldFile:
    def moved(blend: Mapping[str, Source]) -> dict[str, Source]:
        return {
            name: source.model_copy(update={"path": str(folder / source.path)})
            for name, source in blend.items()
        }

    folds = tuple(f.model_copy(update={"blend": moved(f.blend)}) for f in file.folds)
    validation = {}
    for name, held_out in file.validation.items():
        update: dict[str, Any] = {}
        if held_out.path is not None:
            update["path"] = str(folder / held_out.path)
        if held_out.blend is not None:
            update["blend"] = moved(held_out.blend)
        validation[name] = held_out.model_copy(update=update)
    return file.model_copy(update={"folds": folds, "validation": validation})


def _own_errors(error: ValidationError) -> list[Any]:
    """Without pydantic's remark that a list with a wrong entry is too short."""
    errors = error.errors()
    inside = any(len(e["loc"]) > 1 for e in errors)
    return [e for e in errors if not (inside and e["type"] == "too_short")]


def _describe(error: Any, data: Any) -> str:
    """One line for one of pydantic's errors, with the fold's name instead of its number."""
    location: list[Any] = list(error["loc"])
    words = [str(part) for part in location]
    if len(location) > 1 and location[0] == "folds" and isinstance(location[1], int):
        entry = data["folds"][location[1]]
        name = entry.get("name", location[1] + 1) if isinstance(entry, dict) else location[1] + 1
        words = [f"fold '{name}'", *words[2:]]
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if error["type"] == "extra_forbidden":
        model: type[Entry] = FoldFile
        if "blend" in words:
            model = Source
        elif words[0] == "validation":
            model = ValidationSet
        elif words[0].startswith("fold '"):
            model = Fold
        fields = model.model_fields
        message = f"unknown key{suggest(words[-1], fields)} (possible: {', '.join(fields)})"
    return f"{', '.join(words) or 'the file'}: {message}"
