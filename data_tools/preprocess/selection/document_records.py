"""Records of documents that are shuffled or compared: one fixed-size entry per document.

A document is identified by its position in the input, which depends neither on workers nor on the
tasks of an array: the number of its file in the list of all files, and the offset of its line in
bytes of decompressed text, or of its row.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.document_sources.columns import DocumentSources
from data_tools.preprocess.input.blocks import Block, FileRange, TableRows
from megatron_llmjp.data.indices.permutation import derive_keys, mix64

OFFSET_BITS = 44
"""Bits of a position for the offset in a file (16 TiB); the number of the file is above them."""
MAX_FILES = 1 << (64 - OFFSET_BITS)
POSITION = np.dtype([("position", "<u8")])
RECORD = np.dtype(
    [
        ("position", "<u8"),
        ("digest", "<u8", (2,)),
        ("language", "<u8"),
        ("bytes", "<u8"),
        ("source", "<u4"),
    ]
)
"""Position, digest of the texts of all keys, hash of the language, UTF-8 bytes of the text of one
key, and number of the source in the job."""
Records = npt.NDArray[Any]


@dataclass(frozen=True)
class Arrangement:
    """Order of the documents in the output, and whether duplicates are removed.

    Attributes:
        shuffle_seed: seed of the order; None keeps the order of the input.
        remove_duplicates: keep only the first of all documents with the same texts.
    """

    shuffle_seed: int | None = None
    remove_duplicates: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether the output differs from the input's documents in their order."""
        return self.shuffle_seed is not None or self.remove_duplicates

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the records."""
        return RECORD if self.remove_duplicates else POSITION

    @property
    def record_dtype(self) -> np.dtype[Any] | None:
        """Dtype of the records, or None if none are needed."""
        return self.dtype if self.is_needed else None

    def identity(self) -> dict[str, Any]:
        """Return the options that are set, by name."""
        named = {"shuffle_seed": self.shuffle_seed, "remove_duplicates": self.remove_duplicates}
        return {name: value for name, value in named.items() if value not in (None, False)}

    def sort_keys(self, records: Records) -> npt.NDArray[np.uint64]:
        """Return the keys in whose ascending order documents are written; no two are equal.

        They are the positions, permuted by a bijection of 64-bit integers if the documents are
        shuffled.
        """
        positions: npt.NDArray[np.uint64] = records["position"].astype(np.uint64)
        if self.shuffle_seed is None:
            return positions
        first, second = derive_keys(self.shuffle_seed, "documents", 2)
        return mix64(mix64(positions ^ np.uint64(first)) ^ np.uint64(second))


def add_arrangement_flags(add: Callable[..., Any]) -> None:
    """Add the flags of the order of documents and of duplicates."""
    add(
        "--shuffle-seed",
        type=parse_seed,
        metavar="SEED",
        help="shuffle the documents of all inputs; the order depends on the seed and the input "
        "only. Needs free space for a second copy of the output",
    )
    add(
        "--remove-duplicates",
        action="store_true",
        help="keep only the first of all documents with the same text (of all --json-keys)",
    )


def parse_seed(text: str) -> int:
    """Parse a seed, for argparse."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a non-negative integer, found {text}")
    return int(text)


def describe_documents(
    payload: FileRange | bytes | TableRows,
    data: Callable[[FileRange], bytes],
    lines: Sequence[int],
    documents: Mapping[str, Sequence[Sequence[str]]],
    languages: Sequence[str],
    dtype: np.dtype[Any],
) -> dict[str, Records]:
    """Return the records of a block's documents by key, with positions relative to the block.

    Args:
        payload: the block.
        data: reads a range of a file.
        lines: line or row number of each document in the block.
        documents: the texts of each document, by key.
        languages: the language of each document.
        dtype: ``POSITION`` or ``RECORD``.
    """
    numbers = np.array(lines, np.int64)
    if not isinstance(payload, TableRows):
        text = data(payload) if isinstance(payload, FileRange) else payload
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
        numbers = np.concatenate(([0], ends))[numbers]
    records = np.zeros(len(lines), dtype)
    records["position"] = numbers
    if dtype == RECORD:
        in_parallel = zip(*documents.values(), strict=True)
        digests = b"".join(_digest_texts(texts) for texts in in_parallel)
        records["digest"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
        records["language"] = [language_hash(language) for language in languages]
    found = {}
    for key, of_key in documents.items():
        found[key] = records.copy()
        if dtype == RECORD:
            found[key]["bytes"] = [sum(len(_utf8(text)) for text in texts) for texts in of_key]
    return found


def _digest_texts(texts_by_key: Sequence[Sequence[str]]) -> bytes:
    """Return 128 bits of BLAKE2b of the texts of all keys, each with its length."""
    digest = hashlib.blake2b(digest_size=16)
    for texts in texts_by_key:
        digest.update(len(texts).to_bytes(8, "little"))
        for text in texts:
            utf8 = _utf8(text)
            digest.update(len(utf8).to_bytes(8, "little"))
            digest.update(utf8)
    return digest.digest()


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


@functools.cache
def language_hash(language: str) -> int:
    """Return a 64-bit hash of a language."""
    digest = hashlib.blake2b(_utf8(language), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def place_records(
    records: Mapping[str, Records], block: Block, source: int, file_number: int
) -> dict[str, Records]:
    """Return the records of a block with positions in the whole input.

    Args:
        records: records with positions relative to the block.
        block: the block.
        source: number of its source in the job.
        file_number: number of its file in the list of all files.
    """
    start = file_number << OFFSET_BITS | block_start(block)
    placed = {}
    for key, relative in records.items():
        placed[key] = relative.copy()
        placed[key]["position"] += np.uint64(start)
        if relative.dtype == RECORD:
            placed[key]["source"] = source
    return placed


def place_sources(
    sources: DocumentSources | None, block: Block, source: int, lines: int
) -> DocumentSources | None:
    """Return the sources of a block's documents with their places in the source.

    Args:
        sources: the sources relative to the block; None if they are not recorded.
        block: the block.
        source: number of its source in the job.
        lines: lines of the source before the block.
    """
    if sources is None:
        return None
    start = block_start(block)
    first_line = start if isinstance(block.payload, TableRows) else lines
    return sources.placed(source, first_line, start)


def block_start(block: Block) -> int:
    """Return the offset of a block in bytes of decompressed text, or its first row."""
    if isinstance(block.payload, FileRange):
        return block.payload.offset
    if isinstance(block.payload, TableRows):
        return block.end - block.payload.count
    return block.end - block.size
