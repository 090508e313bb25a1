"""Fold files: reading, includes, named blends, and errors with file and line.

pydantic's errors in a fold file -> messages that name file, line and fold.

Reading fold files: includes, named blends and roots of paths.

A long list of datasets is written once, as a named blend in a file of its own that fold files
include::

    # corpus.yaml                                # folds.yaml
    root: /data/corpus                           include: corpus.yaml
    blends:                                      folds:
      ja:                                          - name: main
        wiki: {path: ja/wiki, tokens: 1.3B}          blend: [ja, en]
        ...
      en: {...}

``root`` is where the paths of its own file begin; it is relative to that file's folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_llmjp.data.folds.schema import (
    BlendEntry,
    Fold,
    FoldFile,
    FoldFileModel,
    FoldLearningRate,
    SkipRange,
    ValidationSet,
)
from megatron_llmjp.errors import UserError, did_you_mean
from megatron_llmjp.yaml_text import YamlDocument, YamlPath, read_yaml

READERS_KEYS = ("include", "root", "blends")
"""Keys of a fold file that the reader resolves."""


def describe_validation_error(error: ValidationError, written: YamlDocument) -> str:
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
        message = (
            f"unknown key{did_you_mean(words[-1], possible)} (possible: {', '.join(possible)})"
        )
    return f"{', '.join(words) or 'the file'}: {message}"


def _keys_beside(words: list[str]) -> list[str]:
    """The keys that are known where an unknown one was found."""
    if len(words) == 1:
        return [*FoldFile.model_fields, *READERS_KEYS]
    model: type[FoldFileModel] = Fold if words[0].startswith("fold '") else ValidationSet
    if "blend" in words:
        model = BlendEntry
    elif "learning_rate" in words:
        model = FoldLearningRate
    elif words[0] == "skip":
        model = SkipRange
    return list(model.model_fields)


def read_fold_file(path: Path) -> FoldFile:
    """Read a fold file; dataset paths become relative to the caller's folder.

    Raises:
        UserError: with every mistake and where it is.
    """
    library = _Library()
    main = library.read(path, "fold file", ())
    data = {key: value for key, value in main.data.items() if key not in READERS_KEYS}
    whole = YamlDocument(str(path), data, main.lines)
    for at, holder in _holders(data):
        if isinstance(holder.get("blend"), (str, list)):
            holder["blend"] = library.blend(holder["blend"], whole, (*at, "blend"))
    try:
        return FoldFile.model_validate(data)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, whole)) from None


def _holders(data: dict[str, Any]) -> Iterator[tuple[YamlPath, dict[str, Any]]]:
    """The folds and validation sets, which hold a path or a blend, and where they are."""
    folds, validation = data.get("folds"), data.get("validation")
    for number, fold in enumerate(folds if isinstance(folds, list) else []):
        if isinstance(fold, dict):
            yield ("folds", number), fold
    for name, held_out in (validation if isinstance(validation, dict) else {}).items():
        if isinstance(held_out, dict):
            yield ("validation", name), held_out


@dataclass
class _Library:
    """The named blends of all files read."""

    blends: dict[str, tuple[Any, YamlDocument, YamlPath]] = field(default_factory=dict)
    """By name: the blend, its file, and where it is there."""
    files: set[Path] = field(default_factory=set)

    def read(self, path: Path, named_by: str, including: tuple[Path, ...]) -> YamlDocument:
        """Read a file and all that it includes; paths in it are resolved, its blends kept.

        Raises:
            UserError: a file is missing or wrong, includes itself, or names a blend again.
        """
        written = read_yaml(path, named_by)
        _name_entries(written)
        _resolve_paths(written)
        self.files.add(path.resolve())
        for number, name in enumerate(_texts(written.data.get("include") or [])):
            at = written.where(("include", number))
            if not isinstance(name, str):
                raise UserError(f"{at}: include: expected a file or a list of files, found {name}")
            other = path.parent / name
            chain = (*including, path)
            if other.resolve() in {file.resolve() for file in chain}:
                circle = " -> ".join(map(str, (*chain, other)))
                raise UserError(f"{at}: files include each other in a circle: {circle}")
            if other.resolve() not in self.files:
                self.read_included(other, f"{at}: include", chain)
        blends = written.data.get("blends") or {}
        if not isinstance(blends, dict):
            raise UserError(f"{written.where(('blends',))}: blends: expected names with datasets")
        for name, blend in blends.items():
            self._add(str(name), blend, written)
        return written

    def read_included(self, path: Path, named_by: str, including: tuple[Path, ...]) -> None:
        """Read a file that another includes: it may hold nothing but blends."""
        written = self.read(path, named_by, including)
        for key in written.data:
            if key not in READERS_KEYS:
                raise UserError(
                    f"{written.where((key,))}: '{key}' belongs in the fold file itself; a file "
                    f"that is included holds {', '.join(READERS_KEYS)}"
                )

    def _add(self, name: str, blend: Any, written: YamlDocument) -> None:
        where = written.where(("blends", name))
        if name in self.blends:
            _, other, at = self.blends[name]
            raise UserError(f"{where}: a blend named '{name}' is also in {other.where(at)}")
        if not isinstance(blend, dict) or not blend:
            raise UserError(f"{where}: blend '{name}': expected datasets, as `NAME: {{path: ...}}`")
        self.blends[name] = (blend, written, ("blends", name))

    def blend(self, names: str | list[Any], whole: YamlDocument, at: YamlPath) -> dict[str, Any]:
        """The datasets of one or more named blends; their lines are noted as the fold's own.

        Raises:
            UserError: a blend is unknown, or two of them hold a dataset of the same name.
        """
        found: dict[str, Any] = {}
        for name in _texts(names):
            if not isinstance(name, str) or name not in self.blends:
                raise UserError(
                    f"{whole.where(at)}: there is no blend named '{name}'"
                    f"{did_you_mean(str(name), self.blends)} "
                    f"(known: {', '.join(self.blends) or 'none'}; blends are "
                    "declared under `blends:`, here or in an included file)"
                )
            blend, written, source = self.blends[name]
            for twice in found.keys() & blend.keys():
                raise UserError(
                    f"{whole.where(at)}: dataset '{twice}' is in two of the blends "
                    f"{', '.join(map(str, names))}: see {written.where((*source, twice))}"
                )
            found |= blend
            for place, line in list(written.lines.items()):
                if place[: len(source)] == source and len(place) > len(source):
                    whole.lines[at + place[len(source) :]] = line
        return found


def _texts(value: Any) -> list[Any]:
    """One text or a list of them as a list."""
    return value if isinstance(value, list) else [value]


def _name_entries(written: YamlDocument) -> None:
    """Turn each blend that is a list of datasets into a mapping, named by ``name`` or the path.

    Raises:
        UserError: a list holds datasets and names of blends.
    """
    blends = written.data.get("blends")
    holders = list(_holders(written.data))
    holders += [((), written.data["blends"])] if isinstance(blends, dict) else []
    for at, holder in holders:
        for key in ("blend",) if at else tuple(holder):
            entries = holder.get(key)
            place = (*at, key) if at else ("blends", key)
            if not isinstance(entries, list) or not any(isinstance(e, dict) for e in entries):
                continue
            if not all(isinstance(entry, dict) for entry in entries):
                raise UserError(
                    f"{written.where(place)}: expected a list of datasets, as `- {{path: ...}}`, "
                    "or a list of names of blends, found both"
                )
            names = _names(entries)
            holder[key] = {
                name: {k: v for k, v in entry.items() if k != "name"}
                for name, entry in zip(names, entries, strict=True)
            }
            for old, line in list(written.lines.items()):
                if old[: len(place)] == place and len(old) > len(place):
                    name = names[int(old[len(place)])]
                    new: YamlPath = (*place, name, *old[len(place) + 1 :])
                    written.lines[new] = line


def _names(entries: list[dict[str, Any]]) -> list[str]:
    """Return a name for each dataset of a list: the end of its path, or all if others share it."""
    ends = [str(entry.get("name") or Path(str(entry.get("path"))).name) for entry in entries]
    names = [
        end if ends.count(end) == 1 else str(entry.get("path"))
        for end, entry in zip(ends, entries, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names)]


def _expanded(text: str, where: str) -> str:
    """Return a path with ``~`` and environment variables replaced.

    Raises:
        UserError: a variable is not set.
    """
    found = os.path.expanduser(os.path.expandvars(text))  # noqa: PTH111
    if missing := re.search(r"\$(\w+|\{\w+\})", found):
        raise UserError(f"{where}: {text}: the environment variable {missing[1]} is not set")
    return found


def _resolve_paths(written: YamlDocument) -> None:
    """Put the file's root before every path in it, once for each mapping that anchors share."""
    data = written.data
    root_text = data.get("root") or ""
    if not isinstance(root_text, str):
        raise UserError(f"{written.where(('root',))}: root: expected a folder, found {root_text}")
    root = Path(written.source).parent / _expanded(root_text, written.where(("root",)))
    done: set[int] = set()
    blends = data.get("blends")
    holders = list(_holders(data))
    if isinstance(blends, dict):
        holders += [(("blends", name), {"blend": blend}) for name, blend in blends.items()]
    for at, holder in holders:
        blend = holder.get("blend")
        for entry in [holder, *(blend.values() if isinstance(blend, dict) else [])]:
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                if id(entry) not in done:
                    entry["path"] = str(root / _expanded(entry["path"], written.where(at)))
                done.add(id(entry))
