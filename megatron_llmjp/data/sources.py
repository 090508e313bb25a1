"""What the fold schedule must know of the datasets on disk. Without torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from pathlib import Path

import numpy as np

from megatron_llmjp.data import facts, indexed
from megatron_llmjp.data.fold_file import Fold, FoldFile, ValidationSet
from megatron_llmjp.data.folds import DatasetInfo
from megatron_llmjp.data.index_check import check_entries
from megatron_llmjp.data.indexed import Index
from megatron_llmjp.errors import DataError, UserError

PARTS = ("train", "valid", "test")
_INDEX_BLOCKS = (64, 1 << 16)
_TOKEN_BLOCKS = (128, 1 << 13)
"""How many blocks of how many bytes are read of a file: smaller files are read whole."""


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
            found[path] = DatasetInfo(content_key(path), index.tokens, parts, stamp)
        except (DataError, UserError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return found


def content_key(prefix: str) -> str:
    """A digest that changes when a dataset does, at the cost of some reads.

    It covers the sizes of both files, blocks spread over the index and over the tokens, and the
    checksums of the whole files where ``PREFIX.json`` states them, as preprocess_data does. What it
    does not see: tokens edited in place at equal lengths, between the blocks, in a file larger than
    1 MiB whose ``PREFIX.json`` is missing or was left as it was.
    """
    idx, tokens = indexed.idx_path(prefix), indexed.bin_path(prefix)
    digest = hashlib.sha256(f"{idx.stat().st_size}/{tokens.stat().st_size}".encode())
    _add_blocks(digest, idx, *_INDEX_BLOCKS)
    _add_blocks(digest, tokens, *_TOKEN_BLOCKS)
    for checksum in _stated_checksums(Path(f"{prefix}.json")):
        digest.update(checksum.encode())
    return digest.hexdigest()[:32]


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


def _add_blocks(digest: hashlib._Hash, path: Path, blocks: int, size: int) -> None:
    rest = max(0, path.stat().st_size - size)
    with path.open("rb") as stream:
        for offset in sorted({i * rest // (blocks - 1) for i in range(blocks)}):
            stream.seek(offset)
            # CRC-32 of a block is several times faster than SHA-256, and against accidents enough.
            digest.update(zlib.crc32(stream.read(size)).to_bytes(4, "little"))


def _stated_checksums(path: Path) -> list[str]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return [f"{name} {manifest[name].get('crc32')}" for name in ("bin", "idx")]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []  # none, or another program's file of that name
