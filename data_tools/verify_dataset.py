"""Whether a dataset is what its index and its manifest say."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_tools.documents import document_chunks, read_manifest, with_tokens
from megatron_llmjp.data.indexed_dataset import (
    DatasetIndex,
    bin_path,
    idx_path,
    read_and_check_index,
)
from megatron_llmjp.filesystem import file_crc32


def verify(prefix: str, vocab_size: int | None) -> tuple[list[str], list[str]]:
    """Check a dataset from end to end, in constant memory.

    Args:
        prefix: of the dataset.
        vocab_size: what every token must be below; the manifest's where it is None.

    Returns:
        what was checked, and what is wrong.

    Raises:
        UserError: it cannot even be opened; the message says what is wrong.
        DataError: an entry of its index is damaged.
    """
    index, manifest = read_and_check_index(prefix), read_manifest(prefix)
    checked = ["header, sizes and document index"]
    wrong = check_pointers(index, shared=bool(manifest and manifest["bin"].get("shared")))
    checked.append("pointers and lengths")
    if vocab_size is None and manifest:
        vocab_size = _stated_vocabulary(manifest)
    if vocab_size is not None and not wrong:
        wrong += check_range(index, vocab_size)
        checked.append(f"tokens below {vocab_size:,}")
    if manifest is None:
        checked.append("no manifest: a flipped bit cannot be found")
        return checked, wrong
    wrong += check_manifest(index, manifest)
    checked.append("counts and checksums against the manifest")
    if unchecked := [f".{name}" for name in ("bin", "idx") if "crc32" not in manifest[name]]:
        checked.append(f"the manifest has no checksum of {' and '.join(unchecked)}")
    return checked, wrong


def _stated_vocabulary(manifest: dict[str, Any]) -> int | None:
    """Return the vocabulary size that a manifest states, if it does."""
    found: Any = manifest
    for name in ("recipe", "tokenizer", "vocab_size"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, int) else None


def check_pointers(index: DatasetIndex, shared: bool) -> list[str]:
    """Return whether the sequences follow each other and fill the .bin, if it is not shared."""
    path, size = bin_path(index.prefix), index.dtype.itemsize
    total, expected = path.stat().st_size, 0
    if shared:
        return []
    for piece in document_chunks(index):
        where = f"{idx_path(index.prefix)}: among documents {piece.first:,} and following"
        ends = piece.pointers + piece.lengths.astype(np.int64) * size
        if len(ends):
            if piece.pointers[0] != expected or (piece.pointers[1:] != ends[:-1]).any():
                return [f"{where}, the sequences do not follow each other"]
            expected = int(ends[-1])
    if expected != total:
        return [f"{path}: {total:,} bytes, the index accounts for {expected:,}"]
    return []


def check_range(index: DatasetIndex, vocab_size: int) -> list[str]:
    """Return whether a token lies outside the vocabulary."""
    for piece in document_chunks(index):
        for tokens, part in with_tokens(index, piece):
            if len(tokens) and (tokens.max() >= vocab_size or tokens.min() < 0):
                bad = tokens[(tokens >= vocab_size) | (tokens < 0)][0]
                return [
                    f"{bin_path(index.prefix)}: token {bad} in documents {part.first:,} and "
                    f"following is not below the vocabulary of {vocab_size:,}"
                ]
    return []


def check_manifest(index: DatasetIndex, manifest: dict[str, Any]) -> list[str]:
    """Return where the files differ from their manifest."""
    wrong = []
    for name, found in (("documents", index.documents), ("tokens", index.tokens)):
        if manifest.get(name, found) != found:
            wrong.append(f"{index.prefix}: {found:,} {name}, the manifest says {manifest[name]}")
    for name, path in (("bin", bin_path(index.prefix)), ("idx", idx_path(index.prefix))):
        expected = manifest[name].get("crc32")
        if expected is None:
            continue
        found_crc = f"{file_crc32(path):08x}"
        if found_crc != expected:
            wrong.append(
                f"{path}: its bytes have changed since it was made (CRC-32 {found_crc}, "
                f"expected {expected}). Copy it again, or make it again."
            )
    return wrong
