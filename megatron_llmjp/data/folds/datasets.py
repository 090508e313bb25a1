"""Datasets on disk as the fold schedule needs them: sizes, content digests, cached facts.

What was found out about datasets, kept for the next start.

Keys of contents and numbers of tokens take reads of every dataset of a run, whichever fold is due.
They are remembered under the stamp of the files: sizes, inodes, times of modification and of
change, which the kernel sets at every write and no copy preserves. Without torch.

By what a dataset is known: digests of its contents.

The digest decides the seeds of the dataset's epochs, and with them the order of a run's samples.
``PREFIX.json`` has no part in it. Earlier versions put the checksums that it states into the
digest: a run that such a version began keeps the digests it began with
(``with_recorded_keys``). Without torch.

What the fold schedule must know of the datasets on disk. Without torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_llmjp.data import indexed_dataset
from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.data.folds.schema import Fold, FoldFile, ValidationSet
from megatron_llmjp.data.indexed_dataset import DatasetIndex, check_entries
from megatron_llmjp.errors import DataError, UserError
from megatron_llmjp.filesystem import evenly_spaced_offsets, file_crc32, write_atomically

FOLDER = "facts"
_KEYS = {"key": "key", "earlier_key": "legacy_key", "checksums": "checksums"}
"""Key in the cache file -> attribute of DatasetInfo."""
_FORMAT = 4  # from 2 on every entry of the index was checked; 3 has another key, 4 the largest id


def files_stamp(prefix: str) -> str:
    """What changes whenever one of the dataset's files is written or replaced."""
    found: list[object] = [_FORMAT, str(Path(prefix).resolve())]
    for suffix in (".idx", ".bin", ".json"):
        with suppress(OSError):
            file = Path(f"{prefix}{suffix}").stat()
            found.append((suffix, file.st_size, file.st_ino, file.st_mtime_ns, file.st_ctime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]


def load_facts(stamp: str, splits: Iterable[str], cache: Path) -> DatasetInfo | None:
    """What is known of the dataset with this stamp, if the parts of these splits are."""
    try:
        known = json.loads(_place(stamp, cache).read_text())
        parts = {(split, part): int(tokens) for split, part, tokens in known["parts"]}
        key, earlier, checksums = (str(known[name]) for name in _KEYS)
        largest = None if known["largest_id"] is None else int(known["largest_id"])
        tokens = int(known["tokens"])
        info = DatasetInfo(key, tokens, parts, stamp, earlier, checksums, largest)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return info if set(splits) <= {split for split, _ in parts} else None


def save_facts(datasets: Mapping[str, DatasetInfo], cache: Path) -> None:
    """Keep what is known. A cache that cannot be written costs time at the next start only."""
    with suppress(OSError):
        (cache / FOLDER).mkdir(parents=True, exist_ok=True)
        for info in datasets.values():
            place = _place(info.stamp, cache)
            if place.exists() and load_facts(info.stamp, {split for split, _ in info.parts}, cache):
                continue
            parts = [[split, part, tokens] for (split, part), tokens in info.parts.items()]
            keys = {name: getattr(info, attribute) for name, attribute in _KEYS.items()}
            found = {"tokens": info.tokens, "largest_id": info.largest_id, "parts": parts}
            write_atomically(place, json.dumps({**keys, **found}))


def _place(stamp: str, cache: Path) -> Path:
    return cache / FOLDER / f"{stamp}.json"


_INDEX_BLOCKS = (64, 1 << 16)
_TOKEN_BLOCKS = (128, 1 << 13)
"""How many blocks of how many bytes are read of a file: smaller files are read whole."""
_LARGEST_READ_WHOLE = 1 << 36


@dataclass(frozen=True)
class DatasetKeys:
    """What identifies a dataset."""

    key: str
    """Digest of its contents."""
    earlier: str
    """The digest of earlier versions, which covers ``checksums``; empty where there are none."""
    checksums: str
    """Of both files whole, as ``PREFIX.json`` states them; empty where it does not."""


def compute_keys(prefix: str, checksums: str | None = None) -> DatasetKeys:
    """Find the keys of a dataset, at the cost of some reads.

    ``key`` covers the sizes of both files and blocks spread over the index and over the tokens. It
    does not see tokens edited in place at equal lengths, between the blocks, in a file larger than
    1 MiB; ``checksums`` does, where whoever edited them wrote a new ``PREFIX.json``.

    Args:
        prefix: of the dataset.
        checksums: to be taken instead of those in ``PREFIX.json``.
    """
    idx, tokens = indexed_dataset.idx_path(prefix), indexed_dataset.bin_path(prefix)
    digest = hashlib.sha256(f"{idx.stat().st_size}/{tokens.stat().st_size}".encode())
    _add_blocks(digest, idx, *_INDEX_BLOCKS)
    _add_blocks(digest, tokens, *_TOKEN_BLOCKS)
    key = digest.hexdigest()[:32]
    stated = _stated(Path(f"{prefix}.json")) if checksums is None else checksums
    digest.update(stated.replace(", ", "").encode())
    return DatasetKeys(key, digest.hexdigest()[:32] if stated else "", stated)


def with_recorded_keys(
    datasets: Mapping[str, DatasetInfo], known: Iterable[tuple[str, str]]
) -> dict[str, DatasetInfo]:
    """Return datasets under the keys by which a run that is resumed knows them.

    Args:
        datasets: by path.
        known: key and today's path of each dataset that the checkpoint remembers.

    A run of an earlier version keeps that version's keys for all of its datasets, those it has not
    yet touched included, so that its order of samples stays what it was. Where ``PREFIX.json`` is
    gone since, the checksums that it stated are computed from the files, if these are not larger
    than 64 GiB.
    """
    pairs = set(known)
    keys = {key for key, _ in pairs}
    found = dict(datasets)
    for key, path in sorted(pairs):
        info = found.get(path)
        if info is None or info.legacy_key or key == info.key:
            continue
        if indexed_dataset.bin_path(path).stat().st_size <= _LARGEST_READ_WHOLE:
            found[path] = replace(info, legacy_key=_compute_legacy_key(path))
    if not any(info.legacy_key in keys for info in found.values()):
        return dict(datasets)
    earlier = with_legacy_keys(found)
    return {path: info if info.key in keys else earlier[path] for path, info in found.items()}


def with_legacy_keys(datasets: Mapping[str, DatasetInfo]) -> dict[str, DatasetInfo]:
    """Return datasets under the keys of earlier versions."""
    return {path: replace(info, key=info.legacy_key or info.key) for path, info in datasets.items()}


def _compute_legacy_key(prefix: str) -> str:
    """Return the key that a dataset had while a ``PREFIX.json`` stated its checksums."""
    paths = {"bin": indexed_dataset.bin_path(prefix), "idx": indexed_dataset.idx_path(prefix)}
    return compute_keys(
        prefix, _joined({n: f"{file_crc32(path):08x}" for n, path in paths.items()})
    ).earlier


def _add_blocks(digest: hashlib._Hash, path: Path, blocks: int, size: int) -> None:
    with path.open("rb") as stream:
        for offset in evenly_spaced_offsets(path.stat().st_size, size, blocks):
            stream.seek(offset)
            # CRC-32 of a block is several times faster than SHA-256, and against accidents enough.
            digest.update(zlib.crc32(stream.read(size)).to_bytes(4, "little"))


def _stated(path: Path) -> str:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return _joined({name: manifest[name].get("crc32") for name in ("bin", "idx")})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return ""  # none, or another program's file of that name


def _joined(checksums: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {checksum}" for name, checksum in checksums.items())


PARTS = ("train", "valid", "test")
_ID_BLOCKS = (64, 1 << 15)
"""How many blocks of how many tokens are searched for the largest id."""


def inspect_datasets(file: FoldFile, cache: Path | None = None) -> dict[str, DatasetInfo]:
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
    for path, place in file.dataset_paths().items():
        try:
            stamp = files_stamp(path)
            index = indexed_dataset.read_index(path)
            known = load_facts(stamp, splits.get(path, ()), cache) if cache else None
            if known:
                found[path] = known
                continue
            check_entries(index)
            parts = {
                (split, part): tokens
                for split in splits.get(path, ())
                for part, tokens in _tokens_of_parts(index, split).items()
            }
            keys = compute_keys(path)
            known_keys = (keys.earlier, keys.checksums)
            found[path] = DatasetInfo(
                keys.key, index.tokens, parts, stamp, *known_keys, largest_id(index)
            )
        except (DataError, UserError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return found


def largest_id(index: DatasetIndex) -> int | None:
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
    starts = evenly_spaced_offsets(len(tokens), size, count)
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


def _tokens_of_parts(index: DatasetIndex, split: str) -> dict[str, int]:
    return {
        part: int(index.lengths[first:end].sum(dtype=np.int64))
        for part, (first, end) in split_ends(split, index.sequences).items()
    }
