"""Facts about the datasets on disk that the fold schedule requires; does not import torch.

The facts are a digest of the contents, the number of tokens of each block of documents and the
largest token id. Finding them takes reads of every dataset of a run, so they are cached, keyed by a
stamp of the files: sizes, inodes, and times of modification and change. The kernel sets the change
time at every write, and no copy preserves it.

The entries of an index are checked against each other and the .bin, 20 bytes per document. Above
``MAX_CHECKED_SEQUENCES`` the check is left to :func:`check_datasets`, which runs in the background
(``indices/deferred_check.py``).

The content digest identifies a dataset and determines the seeds of its epochs, and thereby the
order of a run's samples. The manifest ``PREFIX.json`` is not part of it. Earlier versions included
the checksums of the manifest in the digest: a run that such a version started keeps those digests
(:func:`with_recorded_keys`).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_llmjp.data import indexed_dataset
from megatron_llmjp.data.block_tokens import count_block_tokens
from megatron_llmjp.data.folds.declared_sizes import declared_facts, is_missing, wrong_sizes
from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.data.folds.schema import Fold, FoldFile, ValidationSet
from megatron_llmjp.data.folds.splits import split_ends
from megatron_llmjp.data.indexed_dataset import DatasetIndex, check_entries
from megatron_llmjp.errors import DataError, UserError
from megatron_llmjp.filesystem import evenly_spaced_offsets, file_crc32, write_atomically

FACTS_FOLDER = "facts"
_STORED_KEYS = {"key": "key", "earlier_key": "legacy_key", "checksums": "checksums"}
"""Key in the cache file -> attribute of DatasetInfo."""
_CACHE_FORMAT = 5  # 3: another content key; 4: largest token id; 5: tokens per block

MAX_CHECKED_SEQUENCES = 1 << 25
"""Sequences of all datasets without cached facts up to which every entry is checked at once: it
takes about a second. More are checked later."""
_MAX_THREADS = 4

_INDEX_BLOCKS = (64, 1 << 16)
_TOKEN_BLOCKS = (128, 1 << 13)
"""Number and size in bytes of the blocks read of a file; smaller files are read whole."""
_MAX_CHECKSUM_BYTES = 1 << 36
_ID_BLOCKS = (64, 1 << 15)
"""Number and size in tokens of the blocks that are searched for the largest id."""


def files_stamp(prefix: str) -> str:
    """Return a stamp that changes whenever one of the dataset's files is written or replaced."""
    found: list[object] = [_CACHE_FORMAT, str(Path(prefix).resolve())]
    for suffix in (".idx", ".bin", ".json"):
        with suppress(OSError):
            file = Path(f"{prefix}{suffix}").stat()
            found.append((suffix, file.st_size, file.st_ino, file.st_mtime_ns, file.st_ctime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]


def load_facts(stamp: str, splits: Iterable[str], cache: Path) -> DatasetInfo | None:
    """Return the cached facts of a dataset by stamp; None if they lack one of ``splits``."""
    try:
        known = json.loads(_facts_file(stamp, cache).read_text())
        parts = {(split, part): int(tokens) for split, part, tokens in known["parts"]}
        key, earlier, checksums = (str(known[name]) for name in _STORED_KEYS)
        largest = None if known["largest_id"] is None else int(known["largest_id"])
        blocks = np.array(known["block_tokens"], np.int64)
        if blocks.ndim != 1:
            raise ValueError("block_tokens is not a list of numbers")
        info = DatasetInfo(
            key, int(blocks.sum()), parts, stamp, earlier, checksums, largest, blocks,
            checked=known["checked"] is True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return info if set(splits) <= {split for split, _ in parts} else None


def save_facts(datasets: Mapping[str, DatasetInfo], cache: Path) -> None:
    """Cache dataset facts. If the cache is not writable, they are computed again at each start."""
    with suppress(OSError):
        (cache / FACTS_FOLDER).mkdir(parents=True, exist_ok=True)
        for info in datasets.values():
            location = _facts_file(info.stamp, cache)
            known = load_facts(info.stamp, {split for split, _ in info.parts}, cache)
            if info.block_tokens is None or (known and known.checked >= info.checked):
                continue
            parts = [[split, part, tokens] for (split, part), tokens in info.parts.items()]
            keys = {name: getattr(info, attribute) for name, attribute in _STORED_KEYS.items()}
            found = {"largest_id": info.largest_id, "parts": parts, "checked": info.checked}
            blocks = {"block_tokens": info.block_tokens.tolist()}
            write_atomically(location, json.dumps({**keys, **found, **blocks}))


def _facts_file(stamp: str, cache: Path) -> Path:
    return cache / FACTS_FOLDER / f"{stamp}.json"


@dataclass(frozen=True)
class DatasetKeys:
    """Identity of a dataset."""

    key: str
    """Content digest."""
    earlier: str
    """Digest of earlier versions, which includes ``checksums``; empty if there are none."""
    checksums: str
    """CRC-32 of both files according to ``PREFIX.json``; empty if it has none."""


def compute_keys(prefix: str, checksums: str | None = None) -> DatasetKeys:
    """Compute the keys of a dataset from blocks of its files.

    ``key`` covers the sizes of both files, and blocks spread over the index and the tokens. In a
    file larger than 1 MiB it does not detect tokens that were edited in place, at equal lengths,
    between the blocks; ``checksums`` does, if ``PREFIX.json`` was updated after the edit.

    Args:
        prefix: of the dataset.
        checksums: replace those in ``PREFIX.json``.
    """
    idx, tokens = indexed_dataset.idx_path(prefix), indexed_dataset.bin_path(prefix)
    digest = hashlib.sha256(f"{idx.stat().st_size}/{tokens.stat().st_size}".encode())
    _add_blocks(digest, idx, *_INDEX_BLOCKS)
    _add_blocks(digest, tokens, *_TOKEN_BLOCKS)
    key = digest.hexdigest()[:32]
    sums = _read_checksums(Path(f"{prefix}.json")) if checksums is None else checksums
    digest.update(sums.replace(", ", "").encode())
    return DatasetKeys(key, digest.hexdigest()[:32] if sums else "", sums)


def with_recorded_keys(
    datasets: Mapping[str, DatasetInfo], known: Iterable[tuple[str, str]]
) -> dict[str, DatasetInfo]:
    """Return datasets with the keys under which a resumed run has recorded them.

    A run that an earlier version started keeps that version's keys for all of its datasets,
    including those not consumed yet, so that its sample order does not change. If ``PREFIX.json``
    has been deleted since, its checksums are computed from the files, up to a size of 64 GiB.

    Args:
        datasets: dataset facts by path.
        known: (key, current path) of each dataset recorded in the checkpoint.
    """
    pairs = set(known)
    keys = {key for key, _ in pairs}
    found = dict(datasets)
    for key, path in sorted(pairs):
        info = found.get(path)
        if info is None or info.legacy_key or info.declared or key == info.key:
            continue
        if indexed_dataset.bin_path(path).stat().st_size <= _MAX_CHECKSUM_BYTES:
            found[path] = replace(info, legacy_key=_compute_legacy_key(path))
    if not any(info.legacy_key in keys for info in found.values()):
        return dict(datasets)
    earlier = with_legacy_keys(found)
    return {path: info if info.key in keys else earlier[path] for path, info in found.items()}


def with_legacy_keys(datasets: Mapping[str, DatasetInfo]) -> dict[str, DatasetInfo]:
    """Return datasets with the keys of earlier versions."""
    return {path: replace(info, key=info.legacy_key or info.key) for path, info in datasets.items()}


def _compute_legacy_key(prefix: str) -> str:
    """Compute the key that earlier versions derived from a ``PREFIX.json`` with checksums."""
    paths = {"bin": indexed_dataset.bin_path(prefix), "idx": indexed_dataset.idx_path(prefix)}
    return compute_keys(
        prefix, _join_checksums({n: f"{file_crc32(path):08x}" for n, path in paths.items()})
    ).earlier


def _add_blocks(digest: hashlib._Hash, path: Path, blocks: int, size: int) -> None:
    with path.open("rb") as stream:
        for offset in evenly_spaced_offsets(path.stat().st_size, size, blocks):
            stream.seek(offset)
            # CRC-32 is several times faster than SHA-256 and sufficient against accidents.
            digest.update(zlib.crc32(stream.read(size)).to_bytes(4, "little"))


def _read_checksums(path: Path) -> str:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = _join_checksums({name: manifest[name].get("crc32") for name in ("bin", "idx")})
        found.encode()  # raises for lone surrogates
        return found
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return ""  # no manifest, or a file of another program


def _join_checksums(checksums: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {checksum}" for name, checksum in checksums.items())


def inspect_datasets(
    file: FoldFile, cache: Path | None = None, allow_missing: bool = False
) -> dict[str, DatasetInfo]:
    """Open every dataset of a fold file and return its facts, by path.

    Facts that :func:`save_facts` stored in ``cache`` are not computed again.

    Args:
        file: the fold file.
        cache: folder of stored facts.
        allow_missing: for plans: use the declared sizes of datasets without files.

    Raises:
        UserError: datasets are missing or damaged, or have other sizes than the fold file declares;
            the message names all of them, and where they are used.
    """
    splits = _splits_by_path(file)
    problems: dict[str, str] = {}
    found: dict[str, DatasetInfo | None] = {}
    sequences = 0
    places = file.dataset_paths()
    for path in places:
        tokens = file.declared_tokens(path)
        if allow_missing and tokens is not None and is_missing(path):
            found[path] = declared_facts(path, tokens, splits[path])
            continue
        try:
            size = indexed_dataset.read_index(path).sequences
            found[path] = load_facts(files_stamp(path), splits[path], cache) if cache else None
            sequences += size if found[path] is None else 0
        except UserError as error:
            problems[path] = str(error)
    check = sequences <= MAX_CHECKED_SEQUENCES
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        computed: dict[str, Future[DatasetInfo]] = {
            path: pool.submit(_compute_facts, path, splits[path], check)
            for path, known in found.items()
            if known is None
        }
        for path, future in computed.items():
            try:
                found[path] = future.result()
            except (DataError, UserError) as error:
                problems[path] = str(error)
    problems |= wrong_sizes(file, found)
    if problems:
        lines = [f"{places[path]}: {problems[path]}" for path in places if path in problems]
        if allow_missing and any(map(is_missing, problems)):
            lines.append("To plan without files, declare sizes: `datasets: {PATH: {tokens: N}}`")
        raise UserError("\n".join(lines))
    return {path: info for path, info in found.items() if info is not None}


def check_datasets(datasets: Mapping[str, DatasetInfo], cache: Path) -> None:
    """Check every entry of the datasets whose facts were computed without, and record it.

    Raises:
        DataError: an index is damaged.
        UserError: a dataset is missing.
    """
    for path, info in datasets.items():
        if info.checked:
            continue
        check_entries(indexed_dataset.read_index(path))
        if files_stamp(path) == info.stamp:
            save_facts({path: replace(info, checked=True)}, cache)


def _splits_by_path(file: FoldFile) -> dict[str, set[str]]:
    """Return the ``--split`` of each fold and validation set that uses a dataset, by its path."""
    splits: dict[str, set[str]] = {path: set() for path in file.dataset_paths()}
    holders: list[Fold | ValidationSet] = [*file.folds, *file.validation.values()]
    for holder in holders:
        for source in (holder.blend or {}).values():
            splits[source.path].update([holder.split] if holder.split else [])
    return splits


def _compute_facts(path: str, splits: Iterable[str], check: bool) -> DatasetInfo:
    """Read a dataset; check every entry of its index if ``check`` is set."""
    stamp = files_stamp(path)
    index = indexed_dataset.read_index(path)
    if check:
        check_entries(index)
    blocks = count_block_tokens(index)
    parts = {
        (split, part): tokens
        for split in splits
        for part, tokens in _count_tokens_of_parts(index, split).items()
    }
    keys = compute_keys(path)
    return DatasetInfo(
        keys.key, int(blocks.sum()), parts, stamp, keys.earlier, keys.checksums,
        largest_id(index) if blocks.any() else None, blocks, checked=check,
    )  # fmt: skip


def largest_id(index: DatasetIndex) -> int | None:
    """Return the largest token id in a dataset, or in blocks spread over a large dataset.

    A negative id, which only damage produces, is treated as an id above every vocabulary. None if
    there are no tokens or they are not integers.
    """
    if index.dtype.kind not in "iu":
        return None
    path, unsigned = indexed_dataset.bin_path(index.prefix), np.dtype(f"u{index.dtype.itemsize}")
    total = path.stat().st_size // unsigned.itemsize
    if total == 0:
        return None
    count, size = _ID_BLOCKS
    starts = evenly_spaced_offsets(total, size, count) if total > count * size else [0]
    largest = 0
    # Read, not mapped: a page fault reads far more of the file around it.
    with path.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for start in starts:
            stream.seek(start * unsigned.itemsize)
            tokens = np.fromfile(stream, unsigned, size if len(starts) > 1 else total)
            largest = max(largest, int(tokens.max(initial=0)))
    return largest


def _count_tokens_of_parts(index: DatasetIndex, split: str) -> dict[str, int]:
    return {
        part: int(index.lengths[first:end].sum(dtype=np.int64))
        for part, (first, end) in split_ends(split, index.sequences).items()
    }
