"""Whether a dataset is what its index and its manifest say."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_tools.documents import pieces, read_manifest, with_tokens
from megatron_llmjp.data.indexed import Index, bin_path, idx_path, read_index
from megatron_llmjp.system import crc32_of


def verify(prefix: str, vocab_size: int | None) -> tuple[list[str], list[str]]:
    """Check a dataset from end to end, in constant memory.

    Args:
        prefix: of the dataset.
        vocab_size: what every token must be below; the manifest's where it is None.

    Returns:
        what was checked, and what is wrong.

    Raises:
        UserError: it cannot even be opened; the message says what is wrong.
    """
    index, manifest = read_index(prefix), read_manifest(prefix)
    checked = ["header, sizes and document index"]
    wrong = check_pointers(index, shared=bool(manifest and manifest["bin"].get("shared")))
    checked.append("pointers and lengths")
    if vocab_size is None and manifest:
        vocab_size = manifest.get("recipe", {}).get("tokenizer", {}).get("vocab_size")
    if vocab_size is not None and not wrong:
        wrong += check_range(index, vocab_size)
        checked.append(f"tokens below {vocab_size:,}")
    if manifest is None:
        checked.append("no manifest: a flipped bit cannot be found")
        return checked, wrong
    wrong += check_manifest(index, manifest)
    checked.append("counts and checksums against the manifest")
    return checked, wrong


def check_pointers(index: Index, shared: bool) -> list[str]:
    """Return what is wrong with the places of the sequences in the .bin."""
    path, size = bin_path(index.prefix), index.dtype.itemsize
    total, expected = path.stat().st_size, 0
    for piece in pieces(index):
        where = f"{idx_path(index.prefix)}: among documents {piece.first:,} and following"
        if (piece.sequences < 0).any():
            return [f"{where}, the document index runs backwards"]
        lengths = piece.lengths.astype(np.int64) * size
        ends = piece.pointers + lengths
        if (lengths < 0).any():
            return [f"{where}, a length is negative"]
        if len(ends) and (piece.pointers.min() < 0 or ends.max() > total):
            return [f"{where}, a sequence lies outside the {total:,} bytes of the .bin"]
        if (piece.pointers % size).any():
            return [f"{where}, a sequence begins inside a token"]
        if not shared and len(ends):
            if piece.pointers[0] != expected or (piece.pointers[1:] != ends[:-1]).any():
                return [f"{where}, the sequences do not follow each other"]
            expected = int(ends[-1])
    if not shared and expected != total:
        return [f"{path}: {total:,} bytes, the index accounts for {expected:,}"]
    return []


def check_range(index: Index, vocab_size: int) -> list[str]:
    """Return whether a token lies outside the vocabulary."""
    for piece in pieces(index):
        for tokens, part in with_tokens(index, piece):
            if len(tokens) and (tokens.max() >= vocab_size or tokens.min() < 0):
                bad = tokens[(tokens >= vocab_size) | (tokens < 0)][0]
                return [
                    f"{bin_path(index.prefix)}: token {bad} in documents {part.first:,} and "
                    f"following is not below the vocabulary of {vocab_size:,}"
                ]
    return []


def check_manifest(index: Index, manifest: dict[str, Any]) -> list[str]:
    """Return where the files differ from their manifest."""
    wrong = []
    for name, found in (("documents", index.documents), ("tokens", index.tokens)):
        if manifest.get(name, found) != found:
            wrong.append(f"{index.prefix}: {found:,} {name}, the manifest says {manifest[name]:,}")
    for name, path in (("bin", bin_path(index.prefix)), ("idx", idx_path(index.prefix))):
        expected = manifest[name].get("crc32")
        if expected is None:
            continue
        found_crc = f"{crc32_of(path):08x}"
        if found_crc != expected:
            wrong.append(
                f"{path}: its bytes have changed since it was made (CRC-32 {found_crc}, "
                f"expected {expected}). Copy it again, or make it again."
            )
    return wrong
