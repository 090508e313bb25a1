"""The fold file: what a run is trained on, as its user declares it (docs/folds.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from megatron_llmjp.errors import UserError, suggest

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: Any) -> Any:
    """``27.6B`` -> 27600000000; K, M, B and T are powers of a thousand."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([\d_.]+)\s*([KMBT]?)\s*", value)
    if match is None:
        raise ValueError(f"expected a number such as 27600000000 or 27.6B, found '{value}'")
    return round(float(match[1].replace("_", "")) * _UNITS[match[2]])


Count = Annotated[PositiveInt, BeforeValidator(parse_count)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Entry):
    """One dataset of a blend."""

    path: str
    """Prefix of the ``.bin`` and ``.idx``; relative to the fold file."""
    weight: PositiveFloat | None = None
    tokens: Count | None = None
    epochs: PositiveFloat | None = None
    repeat: bool = False
    """Whether the run may see this dataset more than once."""

    @property
    def amount(self) -> tuple[str, float] | None:
        """The kind of amount given and its value."""
        given = [(k, v) for k in ("weight", "tokens", "epochs") if (v := getattr(self, k))]
        return given[0] if given else None

    @model_validator(mode="after")
    def _one_amount(self) -> Source:
        if sum(getattr(self, k) is not None for k in ("weight", "tokens", "epochs")) > 1:
            raise ValueError("give one of weight, tokens and epochs")
        return self


class Fold(_Entry):
    """One fold: a budget and a blend."""

    name: str
    tokens: Count | None = None
    iterations: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    blend: dict[str, Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Fold:
        budgets = [k for k in ("tokens", "iterations", "epochs") if getattr(self, k) is not None]
        if len(budgets) > 1:
            raise ValueError(f"budget given as {' and '.join(budgets)}: give one")
        kinds = {s.amount[0] if s.amount else None for s in self.blend.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted(k or "nothing" for k in kinds))
            raise ValueError(f"the blend mixes {found}: use one kind for all datasets of a fold")
        kind = kinds.pop()
        if budgets == ["epochs"] and kind is not None:
            raise ValueError("with epochs as budget the datasets carry no amounts of their own")
        if kind is None and budgets != ["epochs"]:
            raise ValueError("the datasets need weight, tokens or epochs; or give the fold epochs")
        if kind == "weight" and not budgets:
            raise ValueError("weights need a budget: give the fold tokens or iterations")
        if kind == "epochs" and budgets:
            raise ValueError("epochs per dataset are the budget: take the fold's away")
        return self


class FoldFile(_Entry):
    """The contents of a fold file."""

    seed: int = 1234
    sequence_length: PositiveInt | None = None
    """Must equal the run's seq_length where it is given."""
    folds: tuple[Fold, ...] = Field(min_length=1)
    validation: dict[str, Source] = {}

    @model_validator(mode="after")
    def _names_differ(self) -> FoldFile:
        names = [fold.name for fold in self.folds]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two folds are named '{sorted(twice)[0]}'")
        return self

    def sources(self) -> dict[str, str]:
        """The path of every dataset, and the first place that names it."""
        places: dict[str, str] = {}
        for fold in self.folds:
            for name, source in fold.blend.items():
                places.setdefault(source.path, f"fold '{fold.name}', dataset '{name}'")
        for name, source in self.validation.items():
            places.setdefault(source.path, f"validation set '{name}'")
        return places


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
    return file.model_copy(update={"folds": folds, "validation": moved(file.validation)})


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
        model: type[_Entry] = FoldFile
        if "blend" in words or words[0] == "validation":
            model = Source
        elif words[0].startswith("fold '"):
            model = Fold
        fields = model.model_fields
        message = f"unknown key{suggest(words[-1], fields)} (possible: {', '.join(fields)})"
    return f"{', '.join(words) or 'the file'}: {message}"
