"""Documents of an indexed dataset in pieces of limited size, for programs that stream."""

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

DOCUMENTS_PER_PIECE = 1 << 16
TOKENS_PER_PIECE = 1 << 22


@dataclass(frozen=True)
class DocumentChunk:
    """Consecutive documents.

    Attributes:
        first: number of the first document.
        lengths: tokens of each sequence.
        pointers: offset of each sequence in the .bin, in bytes.
        sequences: sequences of each document.
    """

    first: int
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int32]


def document_chunks(index: DatasetIndex) -> Iterator[DocumentChunk]:
    """Yield all documents; reads plainly, since a memory map would count as memory used."""
    path, total = idx_path(index.prefix), index.sequences
    at = HEADER.size
    for first in range(0, index.documents, DOCUMENTS_PER_PIECE):
        count = min(DOCUMENTS_PER_PIECE, index.documents - first)
        bounds = np.fromfile(path, "<i8", count + 1, offset=at + 12 * total + 8 * first)
        start, number = int(bounds[0]), int(bounds[-1] - bounds[0])
        yield DocumentChunk(
            first,
            np.fromfile(path, "<i4", number, offset=at + 4 * start),
            np.fromfile(path, "<i8", number, offset=at + 4 * total + 8 * start),
            np.diff(bounds).astype(np.int32),
        )


def with_tokens(
    index: DatasetIndex, piece: DocumentChunk
) -> Iterator[tuple[npt.NDArray[Any], DocumentChunk]]:
    """Yield the documents of a piece with their tokens, some at a time."""
    ends = np.cumsum(piece.sequences, dtype=np.int64)  # sequences up to and with each document
    totals = np.concatenate(([0], np.cumsum(piece.lengths, dtype=np.int64)))
    document = 0
    while document < len(ends):
        start = int(ends[document - 1]) if document else 0
        limit = totals[start] + TOKENS_PER_PIECE
        upto = max(int(np.searchsorted(totals[ends], limit, side="right")), document + 1)
        stop = int(ends[upto - 1])
        part = DocumentChunk(
            piece.first + document,
            piece.lengths[start:stop],
            piece.pointers[start:stop],
            piece.sequences[document:upto],
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
    tokens = index.read_tokens()  # a fold: its sequences lie apart
    starts = part.pointers // size
    return np.concatenate([tokens[at : at + n] for at, n in zip(starts, part.lengths, strict=True)])


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """Return the manifest beside a dataset, or None where there is none (Megatron-LM's).

    Raises:
        UserError: it is no JSON object.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); a damaged manifest?") from error
    parts = [manifest.get(name) for name in ("bin", "idx")] if isinstance(manifest, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: not a dataset's manifest (no 'bin' and 'idx' in it)")
    return manifest
