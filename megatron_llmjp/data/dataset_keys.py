"""By what a dataset is known: digests of its contents.

The digest decides the seeds of the dataset's epochs, and with them the order of a run's samples.
``PREFIX.json`` has no part in it. Earlier versions put the checksums that it states into the
digest: a run that such a version began keeps the digests it began with (``as_known``). Without
torch.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llmjp.data import indexed
from megatron_llmjp.data.folds import DatasetInfo
from megatron_llmjp.system import crc32_of, spread

_INDEX_BLOCKS = (64, 1 << 16)
_TOKEN_BLOCKS = (128, 1 << 13)
"""How many blocks of how many bytes are read of a file: smaller files are read whole."""
_LARGEST_READ_WHOLE = 1 << 36


@dataclass(frozen=True)
class Keys:
    """What identifies a dataset."""

    key: str
    """Digest of its contents."""
    earlier: str
    """The digest of earlier versions, which covers ``checksums``; empty where there are none."""
    checksums: str
    """Of both files whole, as ``PREFIX.json`` states them; empty where it does not."""


def keys_of(prefix: str, checksums: str | None = None) -> Keys:
    """Find the keys of a dataset, at the cost of some reads.

    ``key`` covers the sizes of both files and blocks spread over the index and over the tokens. It
    does not see tokens edited in place at equal lengths, between the blocks, in a file larger than
    1 MiB; ``checksums`` does, where whoever edited them wrote a new ``PREFIX.json``.

    Args:
        prefix: of the dataset.
        checksums: to be taken instead of those in ``PREFIX.json``.
    """
    idx, tokens = indexed.idx_path(prefix), indexed.bin_path(prefix)
    digest = hashlib.sha256(f"{idx.stat().st_size}/{tokens.stat().st_size}".encode())
    _add_blocks(digest, idx, *_INDEX_BLOCKS)
    _add_blocks(digest, tokens, *_TOKEN_BLOCKS)
    key = digest.hexdigest()[:32]
    stated = _stated(Path(f"{prefix}.json")) if checksums is None else checksums
    digest.update(stated.replace(", ", "").encode())
    return Keys(key, digest.hexdigest()[:32] if stated else "", stated)


def as_known(
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
        if info is None or info.earlier_key or key == info.key:
            continue
        if indexed.bin_path(path).stat().st_size <= _LARGEST_READ_WHOLE:
            found[path] = replace(info, earlier_key=_earlier_key(path))
    if not any(info.earlier_key in keys for info in found.values()):
        return dict(datasets)
    earlier = all_earlier(found)
    return {path: info if info.key in keys else earlier[path] for path, info in found.items()}


def all_earlier(datasets: Mapping[str, DatasetInfo]) -> dict[str, DatasetInfo]:
    """Return datasets under the keys of earlier versions."""
    return {
        path: replace(info, key=info.earlier_key or info.key) for path, info in datasets.items()
    }


def _earlier_key(prefix: str) -> str:
    """Return the key that a dataset had while a ``PREFIX.json`` stated its checksums."""
    paths = {"bin": indexed.bin_path(prefix), "idx": indexed.idx_path(prefix)}
    return keys_of(
        prefix, _joined({n: f"{crc32_of(path):08x}" for n, path in paths.items()})
    ).earlier


def _add_blocks(digest: hashlib._Hash, path: Path, blocks: int, size: int) -> None:
    with path.open("rb") as stream:
        for offset in spread(path.stat().st_size, size, blocks):
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
