"""Verification of a dataset against its index and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_tools.document_sources.merging import open_sources
from data_tools.document_sources.sources_file import MANIFEST_ENTRY
from data_tools.documents import chunks_with_tokens, document_chunks, read_dataset_manifest
from megatron_llmjp.data.indexed_dataset import (
    DatasetIndex,
    bin_path,
    idx_path,
    read_and_check_index,
)
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import file_crc32


def verify_dataset(prefix: str, vocab_size: int | None) -> tuple[list[str], list[str]]:
    """Check a whole dataset in constant memory.

    Args:
        prefix: of the dataset.
        vocab_size: token ids must be below it; by default the manifest's.

    Returns:
        The checks made, and the problems found.

    Raises:
        UserError: the dataset cannot be opened.
        DataError: an entry of its index is damaged.
    """
    index, manifest = read_and_check_index(prefix), read_dataset_manifest(prefix)
    checked = ["header, sizes and document index"]
    wrong = find_gaps(index, shared=bool(manifest and manifest["bin"].get("shared")))
    checked.append("pointers and lengths")
    if vocab_size is None and manifest:
        vocab_size = _recorded_vocab_size(manifest)
    if vocab_size is not None and not wrong:
        wrong += find_invalid_ids(index, vocab_size)
        checked.append(f"tokens below {vocab_size:,}")
    if manifest is None:
        checked.append("no manifest: flipped bits cannot be detected")
        return checked, wrong
    wrong += find_manifest_differences(index, manifest)
    checked.append("counts and checksums against the manifest")
    if MANIFEST_ENTRY in manifest:
        wrong += find_damaged_sources(index, manifest)
        checked.append("document sources")
    if unchecked := [f".{name}" for name in ("bin", "idx") if "crc32" not in manifest[name]]:
        checked.append(f"the manifest has no checksum of {' and '.join(unchecked)}")
    return checked, wrong


def _recorded_vocab_size(manifest: dict[str, Any]) -> int | None:
    """Return the vocabulary size in a manifest, if it has one."""
    found: Any = manifest
    for name in ("recipe", "tokenizer", "vocab_size"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, int) else None


def find_gaps(index: DatasetIndex, shared: bool) -> list[str]:
    """Check that the sequences are contiguous and cover the .bin, unless it is shared."""
    path, size = bin_path(index.prefix), index.dtype.itemsize
    total, expected = path.stat().st_size, 0
    if shared:
        return []
    for chunk in document_chunks(index):
        where = f"{idx_path(index.prefix)}: in documents from {chunk.first:,} on"
        ends = chunk.pointers + chunk.lengths.astype(np.int64) * size
        if len(ends):
            if chunk.pointers[0] != expected or (chunk.pointers[1:] != ends[:-1]).any():
                return [f"{where}, the sequences are not contiguous"]
            expected = int(ends[-1])
    if expected != total:
        return [f"{path}: {total:,} bytes, the index covers {expected:,}"]
    return []


def find_invalid_ids(index: DatasetIndex, vocab_size: int) -> list[str]:
    """Check that all token ids are below the vocabulary size."""
    for chunk in document_chunks(index):
        for tokens, part in chunks_with_tokens(index, chunk):
            if len(tokens) and (tokens.max() >= vocab_size or tokens.min() < 0):
                bad = tokens[(tokens >= vocab_size) | (tokens < 0)][0]
                return [
                    f"{bin_path(index.prefix)}: token id {bad} in documents from {part.first:,} on "
                    f"is outside the vocabulary of {vocab_size:,}"
                ]
    return []


def find_damaged_sources(index: DatasetIndex, manifest: dict[str, Any]) -> list[str]:
    """Check the file of document sources: its checksum, its size and its contents."""
    try:
        found = open_sources(index.prefix, index.documents)
        assert found is not None
        declared = manifest[MANIFEST_ENTRY]
        expected = declared.get("crc32") if isinstance(declared, dict) else None
        if (crc := f"{file_crc32(found.path):08x}") != expected:
            return [_changed(found.path, crc, expected)]
        for _ in found.chunks():
            pass
    except UserError as error:
        return [str(error)]
    return []


def _changed(path: Path, found: str, expected: Any) -> str:
    return (
        f"{path}: its contents have changed since it was written (CRC-32 {found}, expected "
        f"{expected}). Copy or rebuild it."
    )


def find_manifest_differences(index: DatasetIndex, manifest: dict[str, Any]) -> list[str]:
    """Return the differences between the files and their manifest."""
    wrong = []
    for name, found in (("documents", index.documents), ("tokens", index.tokens)):
        if manifest.get(name, found) != found:
            wrong.append(f"{index.prefix}: {found:,} {name}, but {manifest[name]} in the manifest")
    for name, path in (("bin", bin_path(index.prefix)), ("idx", idx_path(index.prefix))):
        expected = manifest[name].get("crc32")
        if expected is None:
            continue
        found_crc = f"{file_crc32(path):08x}"
        if found_crc != expected:
            wrong.append(_changed(path, found_crc, expected))
    return wrong
