"""Streaming reader of indexed datasets: documents in chunks of limited size, and manifests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.indexed_dataset import HEADER, DatasetIndex, bin_path, idx_path
from megatron_llmjp.errors import UserError

MANIFEST_FORMAT = "megatron_llmjp dataset manifest 1"
"""Value of ``format`` in the manifests of datasets."""
IDENTITY_FIELDS = ("type", "eod_id", "vocab_size")
"""Entries of a tokenizer's identity that are plain values."""
DOCUMENTS_PER_CHUNK = 1 << 16
TOKENS_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class DocumentChunk:
    """Consecutive documents.

    Attributes:
        first: number of the first document.
        lengths: tokens per sequence.
        pointers: byte offset of each sequence in the .bin.
        sequences: sequences per document.
    """

    first: int
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int32]


def document_chunks(index: DatasetIndex) -> Iterator[DocumentChunk]:
    """Yield all documents, read without a memory map, which would count as used memory."""
    path, total = idx_path(index.prefix), index.sequences
    at = HEADER.size
    for first in range(0, index.documents, DOCUMENTS_PER_CHUNK):
        count = min(DOCUMENTS_PER_CHUNK, index.documents - first)
        bounds = np.fromfile(path, "<i8", count + 1, offset=at + 12 * total + 8 * first)
        start, number = int(bounds[0]), int(bounds[-1] - bounds[0])
        yield DocumentChunk(
            first,
            np.fromfile(path, "<i4", number, offset=at + 4 * start),
            np.fromfile(path, "<i8", number, offset=at + 4 * total + 8 * start),
            np.diff(bounds).astype(np.int32),
        )


def chunks_with_tokens(
    index: DatasetIndex, chunk: DocumentChunk
) -> Iterator[tuple[npt.NDArray[Any], DocumentChunk]]:
    """Yield the documents of a chunk with their tokens, in smaller chunks."""
    ends = np.cumsum(chunk.sequences, dtype=np.int64)  # cumulative number of sequences
    totals = np.concatenate(([0], np.cumsum(chunk.lengths, dtype=np.int64)))
    document = 0
    while document < len(ends):
        start = int(ends[document - 1]) if document else 0
        limit = totals[start] + TOKENS_PER_CHUNK
        upto = max(int(np.searchsorted(totals[ends], limit, side="right")), document + 1)
        stop = int(ends[upto - 1])
        part = DocumentChunk(
            chunk.first + document,
            chunk.lengths[start:stop],
            chunk.pointers[start:stop],
            chunk.sequences[document:upto],
        )
        yield _tokens(index, part), part
        document = upto


def _tokens(index: DatasetIndex, part: DocumentChunk) -> npt.NDArray[Any]:
    path, size = bin_path(index.prefix), index.dtype.itemsize
    if not len(part.lengths):
        return np.empty(0, index.dtype)
    total = int(part.lengths.sum(dtype=np.int64))
    ends = part.pointers + part.lengths.astype(np.int64) * size
    if np.array_equal(part.pointers[1:], ends[:-1]):
        return np.fromfile(path, index.dtype, total, offset=int(part.pointers[0]))
    tokens = index.read_tokens()  # the sequences of a fold are not contiguous
    starts = part.pointers // size
    return np.concatenate([tokens[at : at + n] for at, n in zip(starts, part.lengths, strict=True)])


def read_dataset_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """Return the manifest of a dataset, or None if there is none, as for Megatron-LM's datasets.

    Raises:
        UserError: the file is not a dataset manifest.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON ({error}): the manifest is damaged") from error
    parts = [manifest.get(name) for name in ("bin", "idx")] if isinstance(manifest, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: not a dataset manifest (it has no 'bin' and 'idx' entries)")
    if problem := _recipe_problem(manifest):
        raise UserError(f"{path}: {problem}: the manifest is damaged")
    return manifest


def _recipe_problem(manifest: dict[str, Any]) -> str | None:
    """Return which entry that describes the making of a dataset has another type."""
    recipe = manifest.get("recipe", {})
    if not isinstance(recipe, dict):
        return "'recipe' is not a JSON object"
    wrong = [
        n for n in ("tokenizer", "options", "shard") if not isinstance(recipe.get(n, {}), dict)
    ]
    if wrong:
        return f"'recipe' has an invalid entry '{wrong[0]}'"
    sources = recipe.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return "'recipe' has an invalid entry 'sources'"
    tokenizer = recipe.get("tokenizer", {})
    if not all(isinstance(tokenizer.get(n), str | int | None) for n in IDENTITY_FIELDS):
        return "'recipe' has an invalid entry 'tokenizer'"
    is_list = isinstance(recipe.get("shard", {}).get("list"), str | None)
    return None if is_list else "'recipe' has an invalid entry 'shard'"
