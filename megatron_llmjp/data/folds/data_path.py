"""Megatron-LM's flags for data -> a fold file in memory, of one fold in Megatron-LM's order.

``--data-path`` is a list of datasets, ``A B C``, or of weights and datasets, ``0.3 A 0.7 B``;
``--data-args-path`` is a text file with such a list. With these ``--split`` cuts every dataset into
train, valid and test. ``--train-data-path`` and its two siblings name them apart, and
``--per-split-data-args-path`` is a JSON file with the three lists.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import DataConfig
from megatron_llmjp.data.folds.datasets import split_shares
from megatron_llmjp.data.folds.schema import BlendEntry, Fold, FoldFile, ValidationSet
from megatron_llmjp.errors import UserError

LEGACY_SPLIT = "969,30,1"
"""What Megatron-LM takes for ``--split`` when it is not given."""
_WHOLE = ("data_path", "data_args_path")
_PER_PART = (
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)

Blend = dict[str, BlendEntry]


def given_data_flags(data: DataConfig) -> list[str]:
    """Those of Megatron-LM's flags for data that are set, ``--split`` among them."""
    names = [name for name in (*_WHOLE, *_PER_PART, "split") if getattr(data, name)]
    return [f"--{name.replace('_', '-')}" for name in names]


def fold_file_from_flags(data: DataConfig, samples: int | None, seed: int) -> FoldFile:
    """The fold file that Megatron-LM's flags amount to.

    Args:
        data: the flags.
        samples: the run's; Megatron-LM's order depends on it.
        seed: of the order of samples, which in Megatron-LM is ``--seed``.

    Raises:
        UserError: the flags contradict each other, or a file they name is wrong.
    """
    _check(data)
    if samples is None:
        raise UserError(
            f"{given_data_flags(data)[0]} requires --train-iters or --train-samples: Megatron-LM's "
            "sample order depends on the number of samples. A fold file (--fold-file) needs neither"
        )
    train, valid, test, split = _blends(data)
    fold = Fold(name="data-path", order="megatron", samples=samples, blend=train, split=split)
    validation = {
        part: ValidationSet(blend=blend, split=split, part=part)
        for part, blend in (("valid", valid), ("test", test))
        if blend
    }
    return FoldFile(seed=seed, folds=(fold,), validation=validation)


def _check(data: DataConfig) -> None:
    flags = given_data_flags(data)
    whole = [name for name in _WHOLE if getattr(data, name)]
    apart = [name for name in _PER_PART if getattr(data, name)]
    if data.fold_file is not None:
        raise UserError(
            f"both --fold-file and {' '.join(flags)} declare the data: take one of them away (a "
            "fold with `order: megatron` says the same in a fold file, docs/folds.md)"
        )
    if flags == ["--split"]:
        raise UserError("--split cuts the datasets of --data-path, which is not given")
    if (whole and apart) or len(whole) > 1 or "per_split_data_args_path" in apart[:-1]:
        raise UserError(f"{' and '.join(flags)} declare the same data: give one of them")
    if apart and data.split:
        raise UserError(
            f"--split cuts one list of datasets, but {flags[0]} names a list for each part: take "
            "--split away"
        )
    if apart and apart[-1] != "per_split_data_args_path" and not data.train_data_path:
        raise UserError(f"{flags[0]} without --train-data-path: there is nothing to train on")


def _blends(data: DataConfig) -> tuple[Blend, Blend | None, Blend | None, str | None]:
    """The blends of train, valid and test, and the split where they are one."""
    if data.data_path or data.data_args_path:
        words: Sequence[str] = data.data_path
        if data.data_args_path:
            words = _read(Path(data.data_args_path)).split()
        split = data.split or LEGACY_SPLIT
        blend = _blend(words, "--data-path")
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
    blends = [_blend(words, where) if words else None for where, words in lists.items()]
    if blends[0] is None:
        raise UserError(f"{next(iter(lists))}: the list is empty: there is nothing to train on")
    return blends[0], blends[1], blends[2], None


def _blend(words: Sequence[str], where: str) -> Blend:
    """A list of datasets, or of weights and datasets in turn, as Megatron-LM reads it."""
    words = [word for word in words if word.strip()]
    weights: list[float | None] = [_number(word) for word in words[::2]]
    if not words:
        raise UserError(f"{where}: the list is empty")
    if len(words) % 2 or all(weight is None for weight in weights):
        paths, weights = list(words), [None] * len(words)
    elif None in weights:
        raise UserError(
            f"{where}: expected datasets alone, or a weight before each; found "
            f"'{words[2 * weights.index(None)]}' in place of a weight"
        )
    else:
        paths = list(words[1::2])
    blend: Blend = {}
    for path, weight in zip(paths, weights, strict=True):
        if weight is not None and weight <= 0:
            raise UserError(f"{where}: the weight of {path} is {weight:g}: it must be above 0")
        # Megatron-LM repeats a dataset without being asked.
        blend[_name(path, blend)] = BlendEntry(path=path, weight=weight, repeat=True)
    return blend


def _name(path: str, taken: Blend) -> str:
    name = Path(path).name if Path(path).name not in taken else path
    copies = 2
    while name in taken:
        name, copies = f"{path} ({copies})", copies + 1
    return name


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list of datasets cannot be read: {error}") from None


def _read_lists(path: Path) -> dict[str, tuple[str, ...]]:
    """The lists of train, valid and test by their place; each may be one string."""
    expected = 'expected {"train": [...], "valid": [...], "test": [...]}'
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {expected}") from None
    if not isinstance(content, dict) or content.keys() - {"train", "valid", "test"}:
        found = list(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: {expected}, found {found}")
    lists: dict[str, Any] = {part: content.get(part) or [] for part in ("train", "valid", "test")}
    return {
        f"{path}: {part}": tuple(words.split() if isinstance(words, str) else map(str, words))
        for part, words in lists.items()
    }
