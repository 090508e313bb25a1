"""Requested datasets of a new fold file: from folders, a table, or a list of Megatron-LM."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_tools.find_datasets import find_datasets
from data_tools.new_folds.shell_lists import DatasetLists, parse_lists
from megatron_llmjp.arguments import MAX_COUNT, parse_count
from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data.folds.data_path import Blend, blends_of_flags, parse_blend
from megatron_llmjp.errors import UserError

AmountKind = Literal["weight", "tokens", "epochs"]
STDIN = "-"
MAX_PATH = 1000

_PATH_COLUMNS = ("path", "prefix", "dataset")
_AMOUNT_COLUMNS: dict[str, AmountKind] = {
    "weight": "weight",
    "tokens": "tokens",
    "target_tokens": "tokens",
    "epochs": "epochs",
    "repeat": "epochs",
}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NAME_ENDINGS = ("_document", "_text", ".jsonl")


@dataclass(frozen=True)
class RequestedDataset:
    """A dataset to train on."""

    path: str
    amount: float | None = None
    """Weight, tokens or epochs; None to use the whole dataset."""


@dataclass(frozen=True)
class DataRequest:
    """Datasets to train on, and how the amounts are meant."""

    datasets: tuple[RequestedDataset, ...]
    kind: AmountKind | None = None
    """Kind of all amounts; None if there are none."""
    weights_are_tokens: bool = False
    """Without a budget, weights are tokens x repeat: the convention of llm-jp-3."""
    validation: tuple[str, ...] = ()
    """Validation and test sets of a list."""
    held_out: tuple[str, ...] = ()
    """Validation sets given by flag."""
    lists: DatasetLists | None = None
    """The lists of Megatron-LM from which the request was made."""


def request_from_folders(words: Sequence[str], held_out: Sequence[str]) -> DataRequest:
    """Return all datasets in folders and prefixes but those held out, each to be used whole.

    Raises:
        UserError: as :func:`find_datasets`, or all datasets are held out.
    """
    excluded = {os.path.realpath(path) for path in held_out}
    found = [path for path in find_datasets(words) if os.path.realpath(path) not in excluded]
    if not found:
        raise UserError("--datasets: all datasets are validation sets: none is left to train on")
    return DataRequest(tuple(map(RequestedDataset, found)))


def request_from_table(path: Path) -> DataRequest:
    """Read a table of datasets (CSV, TSV or JSON) with a column of weights, tokens or epochs.

    Raises:
        UserError: the table is invalid; the message names file and row.
    """
    rows = _read_rows(path)
    heads = {name for row in rows for name in row}
    where = _only(path, heads, _PATH_COLUMNS, "with the paths of the datasets")
    column = _only(path, heads, _AMOUNT_COLUMNS, "with the amounts")
    if unused := sorted(heads - {where, column}):
        print(f"note: {path}: columns without effect: {', '.join(unused)}", file=sys.stderr)
    kind = _AMOUNT_COLUMNS[column]
    datasets = []
    for number, row in enumerate(rows, start=1):
        prefix = str(row.get(where) or "").strip().removesuffix(".idx").removesuffix(".bin")
        _check_path(prefix, f"{path}: row {number}: {where}")
        amount = _parse_amount(row.get(column), kind, f"{path}: row {number} ({prefix}): {column}")
        datasets.append(RequestedDataset(prefix, amount))
    return DataRequest(tuple(datasets), kind)


def _check_path(path: str, where: str) -> None:
    if not path or "\0" in path or len(path) > MAX_PATH:
        found = f"'{path[:100]}...' of {len(path):,} characters" if path else "nothing"
        raise UserError(
            f"{where}: expected the path of a dataset of at most {MAX_PATH:,} characters, found "
            f"{found}"
        )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--table {path}: cannot read the table: {error}") from None
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: invalid JSON ({error})") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: expected a list of objects, one per dataset")
    elif path.suffix in _DELIMITERS:
        delimiter = _DELIMITERS[path.suffix]
        table = csv.DictReader(text.splitlines(), delimiter=delimiter, restkey="more cells")
        rows = _csv_rows(path, table)
    else:
        raise UserError(f"--table {path}: expected a file ending in .csv, .tsv or .json")
    if not rows:
        raise UserError(f"{path}: the table has no rows")
    return rows


def _csv_rows(path: Path, table: csv.DictReader[str]) -> list[dict[str, Any]]:
    """Return the rows that are not empty, without empty cells."""
    try:
        return [
            {name.strip(): value for name, value in row.items() if name and value}
            for row in table
            if any(row.values())
        ]
    except csv.Error as error:
        raise UserError(f"{path}: row {table.line_num}: {error}") from None


def _only(path: Path, heads: set[str], possible: Iterable[str], what: str) -> str:
    """Return the only column of a table among those possible."""
    found = [name for name in possible if name in heads]
    if len(found) == 1:
        return found[0]
    listed = f"found {' and '.join(found)}: keep one of them" if found else "found none of them"
    raise UserError(
        f"{path}: expected one column {what}, one of {', '.join(possible)}; {listed} "
        f"(columns: {', '.join(sorted(heads))})"
    )


def _parse_amount(value: Any, kind: AmountKind, where: str) -> float:
    """Parse a weight or epochs as a number, tokens also with a unit such as 27.6B."""
    try:
        amount = parse_count(value) if kind == "tokens" else float(value)
        if not isinstance(value, bool) and 0 < amount < MAX_COUNT:
            return float(amount)
    except (TypeError, ValueError, OverflowError):
        pass
    expected = "a positive number" + (", such as 27.6B or 1e9" if kind == "tokens" else "")
    found = "nothing" if value in (None, "") else f"'{value}'"
    raise UserError(f"{where}: expected {expected}, found {found}")


def request_from_list(file: str) -> DataRequest:
    """Read a list of datasets, or a script that contains one; ``-`` is standard input.

    Raises:
        UserError: it cannot be read or is invalid.
    """
    where = "standard input" if file == STDIN else file
    try:
        text = sys.stdin.read() if file == STDIN else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data-list {file}: cannot read the list: {error}") from None
    lists = parse_lists(text, where)
    held_out = tuple(
        source.path
        for words in (lists.valid, lists.test)
        if words
        for source in parse_blend(words, where).values()
    )
    for word in (*lists.train, *held_out):
        _check_path(word, where)
    return replace(_from_blend(parse_blend(lists.train, where), held_out), lists=lists)


def request_from_flags(data: DataConfig) -> DataRequest:
    """Return the datasets that Megatron-LM's data flags name.

    Raises:
        UserError: the flags contradict each other, or a file they name is invalid.
    """
    train, valid, test, _ = blends_of_flags(data)
    separate = bool(data.train_data_path or data.per_split_data_args_path)
    held_out = [source.path for blend in (valid, test) if blend for source in blend.values()]
    return _from_blend(train, tuple(held_out) if separate else ())


def _from_blend(blend: Blend, validation: tuple[str, ...]) -> DataRequest:
    datasets = tuple(RequestedDataset(source.path, source.weight) for source in blend.values())
    kind: AmountKind | None = "weight" if datasets[0].amount is not None else None
    return DataRequest(datasets, kind, True, validation)


def merge_duplicates(request: DataRequest) -> DataRequest:
    """Return the request with each dataset once; the amounts of its entries are added."""
    merged: dict[str, RequestedDataset] = {}
    for entry in request.datasets:
        key = os.path.realpath(entry.path)
        if key in merged and entry.amount is not None:
            total = (merged[key].amount or 0) + entry.amount
            merged[key] = replace(merged[key], amount=total)
            print(
                f"note: {entry.path} is listed more than once: its amounts are added",
                file=sys.stderr,
            )
        else:
            merged.setdefault(key, entry)
    return replace(request, datasets=tuple(merged.values()))


def name_datasets(paths: Sequence[str]) -> list[str]:
    """Return a short, unique name for each dataset.

    That is the last part of its path without endings such as ``_text_document``, preceded by
    folders where several datasets have the same.
    """
    if not paths:
        return []
    absolute = [os.path.normpath(Path(path).absolute()) for path in paths]
    folder = os.path.commonpath(absolute)
    inside = [os.path.relpath(path, folder) for path in absolute]
    for function in _namings():
        names = [function(path, short) for path, short in zip(paths, inside, strict=True)]
        if len(set(names)) == len(names):
            return names
    counts: Counter[str] = Counter()
    names = []
    for path in paths:
        counts[path] += 1
        names.append(path if counts[path] == 1 else f"{path} ({counts[path]})")
    return names


def _namings() -> tuple[Callable[[str, str], str], ...]:
    return (
        lambda path, inside: _stem(Path(path).name),
        lambda path, inside: _stem(inside),
        lambda path, inside: inside,
    )


def _stem(name: str) -> str:
    for ending in _NAME_ENDINGS:
        name = name.removesuffix(ending) or name
    return name


def check_weights(request: DataRequest, tokens: Mapping[str, int]) -> list[str]:
    """Return warnings on weights, meant as tokens, that do not match the sizes of the datasets.

    Args:
        request: with weights that are tokens x repeat.
        tokens: tokens of each dataset, by path.
    """
    repeats = {d.path: (d.amount or 0) / max(tokens[d.path], 1) for d in request.datasets}
    usual = sorted(repeats.values())[len(repeats) // 2]
    return [
        f"{path}: its weight is {repeat:.3g} times its {tokens[path]:,} tokens, most are near "
        f"{usual:.3g}: are digits missing or added?"
        for path, repeat in repeats.items()
        if not usual / 100 < repeat < usual * 100
    ]
