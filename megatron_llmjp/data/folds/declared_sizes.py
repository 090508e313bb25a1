"""Sizes of datasets that a fold file declares, for plans before the files exist.

A dataset with files is never replaced by its declaration; its size is compared with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.data.folds.splits import split_ends
from megatron_llmjp.data.indexed_dataset import bin_path, idx_path

_TOLERANCE = 0.01
"""Relative difference to declared sizes, which are rounded."""


def is_missing(path: str) -> bool:
    """Return whether neither file of a dataset exists."""
    return not (idx_path(path).exists() or bin_path(path).exists())


def declared_facts(path: str, tokens: int, splits: Iterable[str]) -> DatasetInfo:
    """Return the facts of a dataset without files, with a key that no dataset with files has.

    Args:
        path: prefix of the dataset.
        tokens: its declared size.
        splits: each ``--split`` of Megatron-LM that divides it; documents are assumed to be small.
    """
    parts = {
        (split, part): end - first
        for split in splits
        for part, (first, end) in split_ends(split, tokens).items()
    }
    key = hashlib.sha256(f"declared {tokens} {Path(path).absolute()}".encode()).hexdigest()
    return DatasetInfo(key[:32], tokens, parts, declared=True)


def wrong_sizes(file: FoldFile, found: Mapping[str, DatasetInfo | None]) -> dict[str, str]:
    """Return a message for each dataset whose size differs from the declared one, by path."""
    problems = {}
    for path, info in found.items():
        declared = file.declared_tokens(path)
        if info is None or declared is None or _are_close(info.tokens, declared):
            continue
        problems[path] = (
            f"{path} has {info.tokens:,} tokens, {declared:,} are declared under `datasets:` "
            f"({info.tokens / declared - 1:+.1%}): prepare the dataset again, or correct its "
            "`tokens` if it is complete"
        )
    return problems


def _are_close(tokens: int, declared: int) -> bool:
    return abs(tokens - declared) <= _TOLERANCE * declared
