"""Conversion of Megatron-LM's data flags to a fold file with one fold in Megatron-LM's order.

``--data-path`` is a list of datasets, ``A B C``, or of weights and datasets, ``0.3 A 0.7 B``;
``--data-args-path`` is a text file with such a list. With these, ``--split`` divides each dataset
into train, valid and test. ``--train-data-path``, ``--valid-data-path`` and ``--test-data-path``
give separate lists, and ``--per-split-data-args-path`` is a JSON file with the three lists.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data.folds.schema import BlendEntry, Fold, FoldFile, ValidationSet
from megatron_llmjp.data.folds.splits import split_shares
from megatron_llmjp.errors import UserError

DEFAULT_SPLIT = "969,30,1"
"""Megatron-LM's default of ``--split``."""
_BLEND_FLAGS = ("data_path", "data_args_path")
_PER_SPLIT_FLAGS = (
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)

Blend = dict[str, BlendEntry]


def given_data_flags(data: DataConfig) -> list[str]:
    """Return the data flags of Megatron-LM that are set, including ``--split``."""
    names = [name for name in (*_BLEND_FLAGS, *_PER_SPLIT_FLAGS, "split") if getattr(data, name)]
    return [f"--{name.replace('_', '-')}" for name in names]


def fold_file_from_flags(data: DataConfig, samples: int | None, seed: int) -> FoldFile:
    """Return the fold file that is equivalent to Megatron-LM's data flags.

    Args:
        data: the flags.
        samples: number of samples of the run, on which Megatron-LM's order depends.
        seed: seed of the sample order; Megatron-LM uses ``--seed``.

    Raises:
        UserError: the flags contradict each other, or a file they name is invalid.
    """
    train, valid, test, split = blends_of_flags(data)
    if samples is None:
        raise UserError(
            f"{given_data_flags(data)[0]} requires --train-iters or --train-samples: Megatron-LM's "
            "sample order depends on the number of samples. A fold file (--fold-file) needs neither"
        )
    fold = Fold(name="data-path", order="megatron", samples=samples, blend=train, split=split)
    validation = {
        part: ValidationSet(blend=blend, split=split, part=part)
        for part, blend in (("valid", valid), ("test", test))
        if blend
    }
    return FoldFile(seed=seed, folds=(fold,), validation=validation)


def _check(data: DataConfig) -> None:
    flags = given_data_flags(data)
    whole = [name for name in _BLEND_FLAGS if getattr(data, name)]
    apart = [name for name in _PER_SPLIT_FLAGS if getattr(data, name)]
    if data.fold_file is not None:
        raise UserError(
            f"both --fold-file and {' '.join(flags)} declare the data: remove one of them (in a "
            "fold file, a fold with `order: megatron` is equivalent, see docs/folds.md)"
        )
    if flags == ["--split"]:
        raise UserError("--split divides the datasets of --data-path, which is not given")
    if (whole and apart) or len(whole) > 1 or "per_split_data_args_path" in apart[:-1]:
        raise UserError(f"{' and '.join(flags)} declare the same data: give one of them")
    if apart and data.split:
        raise UserError(
            f"--split divides one list of datasets, but {flags[0]} gives a list for each part: "
            "remove --split"
        )
    if apart and apart[-1] != "per_split_data_args_path" and not data.train_data_path:
        raise UserError(f"{flags[0]} requires --train-data-path: there is no training data")


def blends_of_flags(data: DataConfig) -> tuple[Blend, Blend | None, Blend | None, str | None]:
    """Return the blends of train, valid and test, and the split if they share one blend.

    Raises:
        UserError: the flags contradict each other, or a file they name is invalid.
    """
    _check(data)
    if data.data_path or data.data_args_path:
        where, arguments = "--data-path", list(data.data_path)
        if data.data_args_path:
            where = data.data_args_path
            arguments = _read_text(Path(where)).split()
        split = data.split or DEFAULT_SPLIT
        blend = parse_blend(arguments, where)
        _, *held_out = split_shares(split)
        valid, test = (blend if share else None for share in held_out)
        return blend, valid, test, split
    lists = {
        "--train-data-path": data.train_data_path,
        "--valid-data-path": data.valid_data_path,
        "--test-data-path": data.test_data_path,
    }
    if data.per_split_data_args_path:
        lists = _read_lists(Path(data.per_split_data_args_path))
    blends = [
        parse_blend(arguments, where) if arguments else None for where, arguments in lists.items()
    ]
    if blends[0] is None:
        raise UserError(f"{next(iter(lists))}: the list is empty: there is no training data")
    return blends[0], blends[1], blends[2], None


def parse_blend(arguments: Sequence[str], where: str) -> Blend:
    """Parse a list of datasets, or of alternating weights and datasets, as Megatron-LM does.

    Raises:
        UserError: the list is empty or invalid; the message begins with ``where``.
    """
    arguments = [argument for argument in arguments if argument.strip()]
    weights: list[float | None] = [_parse_weight(argument) for argument in arguments[::2]]
    if not arguments:
        raise UserError(f"{where}: the list is empty")
    if len(arguments) % 2 or all(weight is None for weight in weights):
        paths, weights = list(arguments), [None] * len(arguments)
    elif None in weights:
        raise UserError(
            f"{where}: expected datasets alone, or a weight before each; found "
            f"'{arguments[2 * weights.index(None)]}' instead of a weight"
        )
    else:
        paths = list(arguments[1::2])
    blend: Blend = {}
    copies: Counter[str] = Counter()
    for path, weight in zip(paths, weights, strict=True):
        if weight is not None and not 0 < weight < math.inf:
            raise UserError(f"{where}: the weight of {path} must be positive, found {weight:g}")
        # Megatron-LM repeats datasets by default.
        name = _unique_name(path, blend, copies)
        blend[name] = BlendEntry(path=path, weight=weight, repeat=True)
    return blend


def _unique_name(path: str, taken: Blend, copies: Counter[str]) -> str:
    """Return the name of a dataset in a blend; ``copies`` counts the numbers used for a path."""
    name = Path(path).name if Path(path).name not in taken else path
    while name in taken:
        copies[path] += 1
        name = f"{path} ({copies[path] + 1})"
    return name


def _parse_weight(argument: str) -> float | None:
    try:
        return float(argument)
    except ValueError:
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the list of datasets: {error}") from None


def _read_lists(path: Path) -> dict[str, tuple[str, ...]]:
    """Read the lists of train, valid and test, keyed by their location; each may be a string."""
    expected = 'expected {"train": [...], "valid": [...], "test": [...]}'
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON ({error}); {expected}") from None
    if not isinstance(content, dict) or content.keys() - {"train", "valid", "test"}:
        found = list(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: {expected}, found {found}")
    lists: dict[str, Any] = {part: content.get(part) or [] for part in ("train", "valid", "test")}
    for part, arguments in lists.items():
        if not isinstance(arguments, str | list):
            found = reprlib.repr(arguments)
            raise UserError(f"{path}: {part}: expected a list of datasets, found {found}")
    return {
        f"{path}: {part}": tuple(
            arguments.split() if isinstance(arguments, str) else map(str, arguments)
        )
        for part, arguments in lists.items()
    }
