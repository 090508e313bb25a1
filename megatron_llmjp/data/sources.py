"""What the fold schedule must know of the datasets on disk. Without torch."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np

from megatron_llmjp.data import facts, indexed
from megatron_llmjp.data.dataset_keys import keys_of
from megatron_llmjp.data.fold_file import Fold, FoldFile, ValidationSet
from megatron_llmjp.data.folds import DatasetInfo
from megatron_llmjp.data.index_check import check_entries
from megatron_llmjp.data.indexed import Index
from megatron_llmjp.errors import DataError, UserError
from megatron_llmjp.system import spread

PARTS = ("train", "valid", "test")
_ID_BLOCKS = (64, 1 << 15)
"""How many blocks of how many tokens are searched for the largest id."""


def inspect_sources(file: FoldFile, cache: Path | None = None) -> dict[str, DatasetInfo]:
    """Open every dataset of a fold file.

    What ``facts.remember`` has put into ``cache`` is not found out again.

    Raises:
        UserError: naming all datasets that are missing or damaged, and where they are declared.
    """
    splits: dict[str, set[str]] = {}
    holders: list[Fold | ValidationSet] = [*file.folds, *file.validation.values()]
    for holder in holders:
        for source in (holder.blend or {}).values():
            splits.setdefault(source.path, set()).update([holder.split] if holder.split else [])
    found, problems = {}, []
    for path, place in file.sources().items():
        try:
            stamp = facts.stamp(path)
            index = indexed.read_index(path)
            known = facts.recall(stamp, splits.get(path, ()), cache) if cache else None
            if known:
                found[path] = known
                continue
            check_entries(index)
            parts = {
                (split, part): tokens
                for split in splits.get(path, ())
                for part, tokens in _tokens_of_parts(index, split).items()
            }
            keys = keys_of(path)
            known_keys = (keys.earlier, keys.checksums)
            found[path] = DatasetInfo(
                keys.key, index.tokens, parts, stamp, *known_keys, largest_id(index)
            )
        except (DataError, UserError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return found


def largest_id(index: Index) -> int | None:
    """The largest token id in a dataset, or in blocks spread over a large one.

    A negative id, which only damage makes, counts as one beyond every vocabulary. None if there is
    no token, or tokens are no integers.
    """
    if index.dtype.kind not in "iu" or index.tokens == 0:
        return None
    tokens = index.read_tokens().view(f"u{index.dtype.itemsize}")
    count, size = _ID_BLOCKS
    if len(tokens) <= count * size:
        return int(tokens.max())
    starts = spread(len(tokens), size, count)
    return max(int(tokens[start : start + size].max()) for start in starts)


def split_shares(split: str) -> tuple[float, float, float]:
    """The shares of train, valid and test that Megatron-LM's ``--split`` states.

    Raises:
        UserError: these are not one to three shares.
    """
    found = re.findall(r"[.0-9]+", split)
    try:
        shares = [float(share) for share in found]
    except ValueError:
        shares = []
    if not 0 < len(shares) <= len(PARTS) or sum(shares) <= 0:
        raise UserError(
            f"split '{split}': expected the shares of train, valid and test, such as 969,30,1"
        )
    train, valid, test = [*shares, 0.0, 0.0][:3]
    return train, valid, test


def split_ends(split: str, documents: int) -> dict[str, tuple[int, int]]:
    """First document, and the one after the last, of each part of Megatron-LM's ``--split``.

    The arithmetic of megatron-core's ``parse_and_normalize_split`` and
    ``BlendedMegatronDatasetBuilder``, which cannot be had without torch; the samples themselves
    come from there.

    Raises:
        UserError: these are not one to three shares.
    """
    shares = (np.array(split_shares(split)) / np.sum(split_shares(split))).tolist()
    ends = [round(end * float(documents)) for end in itertools.accumulate([0, *shares])]
    return dict(zip(PARTS, itertools.pairwise(ends), strict=True))


def _tokens_of_parts(index: Index, split: str) -> dict[str, int]:
    return {
        part: int(index.lengths[first:end].sum(dtype=np.int64))
        for part, (first, end) in split_ends(split, index.sequences).items()
    }
