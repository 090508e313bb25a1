"""Loader of fold files: includes, named blends, path resolution, and errors with file and line.

A long list of datasets can be declared once, as a named blend in a separate file that fold files
include::

    # corpus.yaml                                # folds.yaml
    root: /data/corpus                           include: corpus.yaml
    blends:                                      folds:
      ja:                                          - name: main
        wiki: {path: ja/wiki, tokens: 1.3B}          blend: [ja, en]
        ...
      en: {...}

``root`` is the base folder of the paths in its file, relative to that file's folder.
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
    DeclaredDataset,
    Fold,
    FoldFile,
    FoldFileModel,
    FoldLearningRate,
    LoaderKeys,
    SkipRange,
    ValidationSet,
)
from megatron_llmjp.errors import UserError, did_you_mean
from megatron_llmjp.yaml_text import YamlDocument, YamlPath, read_yaml

LOADER_KEYS = tuple(LoaderKeys.model_fields)
"""Keys of a fold file that the loader resolves."""
DATASETS = "datasets"
INCLUDED_KEYS = (*LOADER_KEYS, DATASETS)
"""Keys that an included file may contain."""


def describe_validation_error(error: ValidationError, written: YamlDocument) -> str:
    """Return one line per error, with file, line and fold."""
    return "\n".join(
        f"{written.where(tuple(e['loc']))}: {_describe_one(e, written.data)}"
        for e in _relevant_errors(error)
    )


def _relevant_errors(error: ValidationError) -> list[Any]:
    """Drop pydantic's secondary error that a list with an invalid entry is too short."""
    errors = error.errors()
    inside = any(len(e["loc"]) > 1 for e in errors)
    return [e for e in errors if not (inside and e["type"] == "too_short")]


def _describe_one(error: Any, data: Any) -> str:
    """Describe one error, with the fold's name instead of its index."""
    location: list[Any] = list(error["loc"])
    words = [str(part) for part in location]
    if len(location) > 1 and location[0] == "folds" and isinstance(location[1], int):
        entry = data["folds"][location[1]]
        name = entry.get("name", location[1] + 1) if isinstance(entry, dict) else location[1] + 1
        words = [f"fold '{name}'", *words[2:]]
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
    if error["type"] == "extra_forbidden":
        possible = _allowed_keys(words)
        message = (
            f"unknown key{did_you_mean(words[-1], possible)} (possible: {', '.join(possible)})"
        )
    return f"{', '.join(words) or 'the file'}: {message}"


def _allowed_keys(words: list[str]) -> list[str]:
    """Return the keys that are allowed where an unknown key was found."""
    if len(words) == 1:
        return [*FoldFile.model_fields, *LOADER_KEYS]
    model: type[FoldFileModel] = Fold if words[0].startswith("fold '") else ValidationSet
    if "blend" in words:
        model = BlendEntry
    elif "learning_rate" in words:
        model = FoldLearningRate
    elif words[0] == "skip":
        model = SkipRange
    elif words[0] == DATASETS:
        model = DeclaredDataset
    return list(model.model_fields)


def read_fold_file(path: Path) -> FoldFile:
    """Read a fold file; dataset paths become relative to the working directory.

    Raises:
        UserError: the file is invalid; the message lists all errors with their lines.
    """
    named_blends = _NamedBlends()
    main = named_blends.read(path, "fold file", ())
    data = {key: value for key, value in main.data.items() if key not in LOADER_KEYS}
    whole = YamlDocument(str(path), data, main.lines)
    for location, holder in _folds_and_validation_sets(data):
        if isinstance(holder.get("blend"), (str, list)):
            holder["blend"] = named_blends.blend(holder["blend"], whole, (*location, "blend"))
    named_blends.add_declared_sizes(whole)
    try:
        return FoldFile.model_validate(data)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, whole)) from None


def _folds_and_validation_sets(data: dict[str, Any]) -> Iterator[tuple[YamlPath, dict[str, Any]]]:
    """Yield the folds and validation sets, each with its location in the file."""
    folds, validation = data.get("folds"), data.get("validation")
    for number, fold in enumerate(folds if isinstance(folds, list) else []):
        if isinstance(fold, dict):
            yield ("folds", number), fold
    for name, held_out in (validation if isinstance(validation, dict) else {}).items():
        if isinstance(held_out, dict):
            yield ("validation", name), held_out


@dataclass
class _NamedBlends:
    """Named blends of all files read."""

    blends: dict[str, tuple[Any, YamlDocument, YamlPath]] = field(default_factory=dict)
    """By name: the blend, its file, and its location in that file."""
    files: set[Path] = field(default_factory=set)
    declared: dict[str, tuple[Any, YamlDocument]] = field(default_factory=dict)
    """Declared datasets by path, with their file."""

    def read(self, path: Path, named_by: str, including: tuple[Path, ...]) -> YamlDocument:
        """Read a file and its includes, resolve its paths and collect its blends.

        Raises:
            UserError: a file is missing or invalid, includes itself, or redefines a blend.
        """
        written = read_yaml(path, named_by)
        _name_entries(written)
        _resolve_paths(written)
        self.files.add(path.resolve())
        for number, name in enumerate(_as_list(written.data.get("include") or [])):
            location = written.where(("include", number))
            if not isinstance(name, str):
                raise UserError(
                    f"{location}: include: expected a file or a list of files, found {name}"
                )
            other = path.parent / name
            chain = (*including, path)
            if other.resolve() in {file.resolve() for file in chain}:
                circle = " -> ".join(map(str, (*chain, other)))
                raise UserError(f"{location}: circular include: {circle}")
            if other.resolve() not in self.files:
                self.read_included(other, f"{location}: include", chain)
        blends = written.data.get("blends") or {}
        if not isinstance(blends, dict):
            raise UserError(
                f"{written.where(('blends',))}: blends: expected a mapping of names to datasets"
            )
        for name, blend in blends.items():
            self._add(str(name), blend, written)
        self._add_declared(written)
        return written

    def read_included(self, path: Path, named_by: str, including: tuple[Path, ...]) -> None:
        """Read an included file, which may contain only blends and sizes of datasets."""
        written = self.read(path, named_by, including)
        for key in written.data:
            if key not in INCLUDED_KEYS:
                raise UserError(
                    f"{written.where((key,))}: '{key}' belongs in the fold file itself; an "
                    f"included file may contain only {', '.join(INCLUDED_KEYS)}"
                )

    def _add_declared(self, written: YamlDocument) -> None:
        found = written.data.get(DATASETS)
        if found is None:
            return
        if not isinstance(found, dict):
            raise UserError(
                f"{written.where((DATASETS,))}: {DATASETS}: expected `PATH: {{tokens: ...}}` per "
                "dataset"
            )
        for path, entry in found.items():
            if path in self.declared:
                other = self.declared[path][1].where((DATASETS, path))
                raise UserError(
                    f"{written.where((DATASETS, path))}: {path} is already declared in {other}"
                )
            self.declared[path] = (entry, written)

    def add_declared_sizes(self, whole: YamlDocument) -> None:
        """Add the datasets declared in all files, with their lines."""
        for path, (entry, written) in self.declared.items():
            whole.data.setdefault(DATASETS, {})[path] = entry
            for key in ((), ("tokens",)):
                location = (DATASETS, path, *key)
                whole.lines[location] = written.where(location)

    def _add(self, name: str, blend: Any, written: YamlDocument) -> None:
        where = written.where(("blends", name))
        if name in self.blends:
            _, other, location = self.blends[name]
            raise UserError(
                f"{where}: a blend named '{name}' is already defined in {other.where(location)}"
            )
        if not isinstance(blend, dict) or not blend:
            raise UserError(f"{where}: blend '{name}': expected datasets, as `NAME: {{path: ...}}`")
        self.blends[name] = (blend, written, ("blends", name))

    def blend(
        self, names: str | list[Any], whole: YamlDocument, location: YamlPath
    ) -> dict[str, Any]:
        """Return the datasets of one or more named blends, and record their lines for the fold.

        Raises:
            UserError: a blend is unknown, or two of them contain a dataset of the same name.
        """
        found: dict[str, Any] = {}
        for name in _as_list(names):
            if not isinstance(name, str) or name not in self.blends:
                known = ", ".join(self.blends) or "none"
                raise UserError(
                    f"{whole.where(location)}: no blend named '{name}'"
                    f"{did_you_mean(str(name), self.blends)} (known: {known}; blends are declared "
                    "under `blends:`, here or in an included file)"
                )
            blend, written, source = self.blends[name]
            for twice in found.keys() & blend.keys():
                raise UserError(
                    f"{whole.where(location)}: dataset '{twice}' is in two of the blends "
                    f"{', '.join(map(str, names))}: see {written.where((*source, twice))}"
                )
            found |= blend
            for entry_location, line in list(written.lines.items()):
                if entry_location[: len(source)] == source and len(entry_location) > len(source):
                    whole.lines[location + entry_location[len(source) :]] = line
        return found


def _as_list(value: Any) -> list[Any]:
    """Wrap a single value in a list."""
    return value if isinstance(value, list) else [value]


def _name_entries(written: YamlDocument) -> None:
    """Convert each blend that is a list of datasets to a mapping, keyed by ``name`` or the path.

    Raises:
        UserError: a list mixes datasets and names of blends.
    """
    blends = written.data.get("blends")
    holders = list(_folds_and_validation_sets(written.data))
    holders += [((), written.data["blends"])] if isinstance(blends, dict) else []
    for location, holder in holders:
        for key in ("blend",) if location else tuple(holder):
            entries = holder.get(key)
            entry_location = (*location, key) if location else ("blends", key)
            if not isinstance(entries, list) or not any(isinstance(e, dict) for e in entries):
                continue
            if not all(isinstance(entry, dict) for entry in entries):
                raise UserError(
                    f"{written.where(entry_location)}: expected a list of datasets, as "
                    "`- {path: ...}`, or a list of blend names, found both"
                )
            names = _entry_names(entries)
            holder[key] = {
                name: {k: v for k, v in entry.items() if k != "name"}
                for name, entry in zip(names, entries, strict=True)
            }
            for old, line in list(written.lines.items()):
                if old[: len(entry_location)] == entry_location and len(old) > len(entry_location):
                    name = names[int(old[len(entry_location)])]
                    new: YamlPath = (*entry_location, name, *old[len(entry_location) + 1 :])
                    written.lines[new] = line


def _entry_names(entries: list[dict[str, Any]]) -> list[str]:
    """Return a name for each dataset of a list: the last part of its path if that is unique."""
    ends = [str(entry.get("name") or Path(str(entry.get("path"))).name) for entry in entries]
    names = [
        end if ends.count(end) == 1 else str(entry.get("path"))
        for end, entry in zip(ends, entries, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names)]


def _expand_variables(text: str, where: str) -> str:
    """Return a path with ``~`` and environment variables replaced.

    Raises:
        UserError: a variable is not set.
    """
    found = os.path.expanduser(os.path.expandvars(text))  # noqa: PTH111
    if missing := re.search(r"\$(\w+|\{\w+\})", found):
        raise UserError(f"{where}: {text}: the environment variable {missing[1]} is not set")
    return found


def _resolve_paths(written: YamlDocument) -> None:
    """Prepend the file's root to its paths, once for each mapping that YAML anchors share."""
    data = written.data
    root_text = data.get("root") or ""
    if not isinstance(root_text, str):
        raise UserError(f"{written.where(('root',))}: root: expected a folder, found {root_text}")
    root = Path(written.source).parent / _expand_variables(root_text, written.where(("root",)))
    done: set[int] = set()
    blends = data.get("blends")
    holders = list(_folds_and_validation_sets(data))
    if isinstance(blends, dict):
        holders += [(("blends", name), {"blend": blend}) for name, blend in blends.items()]
    for location, holder in holders:
        blend = holder.get("blend")
        for entry in [holder, *(blend.values() if isinstance(blend, dict) else [])]:
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                if id(entry) not in done:
                    entry["path"] = str(
                        root / _expand_variables(entry["path"], written.where(location))
                    )
                done.add(id(entry))
    if isinstance(data.get(DATASETS), dict):
        data[DATASETS] = _resolve_keys(written, root)


def _resolve_keys(written: YamlDocument, root: Path) -> dict[str, Any]:
    """Return the declared datasets by real path, and record their lines.

    Raises:
        UserError: two keys are the same path.
    """
    found: dict[str, Any] = {}
    for name, entry in written.data[DATASETS].items():
        where = written.where((DATASETS, name))
        path = os.path.realpath(root / _expand_variables(name, where))
        if path in found:
            raise UserError(f"{where}: {path} is declared twice")
        found[path] = entry
        for location, line in list(written.lines.items()):
            if location[:2] == (DATASETS, name):
                resolved = (DATASETS, path, *location[2:])
                written.lines[resolved] = line
    return found
