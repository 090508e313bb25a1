"""Reader and validator of Megatron-LM's indexed datasets; does not import torch.

A dataset is two files: ``<prefix>.bin`` (token ids) and ``<prefix>.idx`` (index). Format, little
endian, from megatron-core ``datasets/indexed_dataset.py``:

.bin: the token ids of all sequences and nothing else.
.idx: ``MMIDIDX\0\0`` (9 bytes), u64 version = 1, u8 dtype code, u64 sequences S, u64 entries D
of the document index, int32[S] lengths in tokens, int64[S] offsets in bytes, int64[D] document
index (0, then the cumulative number of sequences at the end of each document: documents = D - 1).

Samples are read through megatron-core's IndexedDataset (:func:`open_indexed_dataset`) after checks
that megatron-core lacks: it opens a truncated .bin without an error. An index that is damaged
between its first and its last entry yields tokens of other documents, or fails in the middle of a
run. :func:`check_entries` therefore compares every entry with the .bin in constant memory, reading
20 bytes per sequence. It runs in every data tool and when a run first uses a dataset
(``folds/datasets.py`` caches the result). ``indexed_dataset_writer.py`` writes datasets.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from megatron_llmjp.errors import DataError, UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    code: np.dtype(name)
    for code, name in enumerate(
        ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1
    )
}

NON_INTEGER_DTYPE = np.dtype(np.float32)

_TEXT_FILE = re.compile(r"(?P<prefix>.+)\.(jsonl|json|ndjson|txt|parquet)(\.\w+)?")

CHUNK = 1 << 20  # index entries checked at a time


def bin_path(prefix: str | Path) -> Path:
    """Return the path of a dataset's token file."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of a dataset's index file."""
    return Path(f"{prefix}.idx")


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype in which Megatron-LM stores ids of this vocabulary: uint16 below 65,500.

    ``vocab_size`` is the largest id plus one. Megatron-LM uses the number of tokens instead, and
    writes wrong ids if the ids have gaps.
    """
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


@dataclass(frozen=True)
class DatasetIndex:
    """Contents of an .idx file. The arrays are memory-mapped: opening reads only a few pages.

    Attributes:
        lengths: tokens per sequence, ``[S]``.
        pointers: byte offset of each sequence in the .bin, ``[S]``.
        document_indices: first sequence of each document, followed by S, ``[D]``.
    """

    prefix: Path
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]

    @property
    def sequences(self) -> int:
        """Number of sequences: one per document unless documents are split into sentences."""
        return len(self.lengths)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens; reads the lengths of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    def read_tokens(self) -> npt.NDArray[Any]:
        """Return the token ids of the whole .bin, memory-mapped."""
        path = bin_path(self.prefix)
        if path.stat().st_size == 0:
            return np.empty(0, self.dtype)
        return np.memmap(path, self.dtype, mode="r")


def read_index(prefix: str | Path) -> DatasetIndex:
    """Open an .idx and check its header and sizes against the .bin, in constant time.

    Raises:
        UserError: a file is missing, truncated or not in this format, or the .bin is shorter than
            the index requires.
    """
    path = _existing(prefix)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(
            f"{path}: not a Megatron index (starts with {head[:9]!r}, expected {MAGIC!r}). "
            "Rebuild the dataset with preprocess_data."
        )
    _, version, code, sequences, entries = HEADER.unpack(head)
    if version != VERSION or DTYPES.get(code, NON_INTEGER_DTYPE).kind not in "iu" or entries < 1:
        raise UserError(
            f"{path}: damaged header (version {version}, dtype code {code}, {entries} document "
            f"entries). Expected version {VERSION}, the code of an integer dtype (1 to 5, 8) and "
            "at least one entry."
        )
    expected = HEADER.size + 12 * sequences + 8 * entries
    # A multimodal index has one more byte per sequence, which is not used here.
    if size not in (expected, expected + sequences):
        raise UserError(
            f"{path}: {size:,} bytes, expected {expected:,} for {sequences:,} sequences and "
            f"{entries - 1:,} documents. The file is truncated or damaged: copy it again or "
            "rebuild it with preprocess_data."
        )
    index = _map(Path(prefix), path, DTYPES[code], sequences, entries)
    _check_bin(index)
    return index


def _text_file(path: str) -> str | None:
    """Return the path without its suffixes if it names an input file of preprocess_data."""
    named = _TEXT_FILE.fullmatch(path)
    return named and named["prefix"]


def _existing(prefix: str | Path) -> Path:
    path = idx_path(prefix)
    for missing, other in ((path, bin_path(prefix)), (bin_path(prefix), path)):
        if missing.is_file():
            continue
        hint = "Expected the path without .bin or .idx, such as data/ja_text_document."
        if text := _text_file(str(prefix)):
            hint = (
                f"{prefix} is a text file, not a tokenized dataset. Tokenize it and give the "
                f"resulting prefix: preprocess_data --input {prefix} --output-prefix {text} "
                "--append-eod --tokenizer-type TYPE --tokenizer-model MODEL writes "
                f"{text}_text_document"
            )
        if str(prefix).endswith((".bin", ".idx")):
            hint = f"Give the path without its suffix: {str(prefix)[:-4]}"
        elif other.is_file():
            hint = f"{other} exists: the dataset is incomplete. Run preprocess_data again."
        raise UserError(f"{missing}: no such file. {hint}")
    return path


def _map(
    prefix: Path, path: Path, dtype: np.dtype[Any], sequences: int, entries: int
) -> DatasetIndex:
    def array(kind: type, count: int, offset: int) -> npt.NDArray[Any]:
        if count == 0:  # an empty array cannot be memory-mapped
            return np.empty(0, kind)
        return np.memmap(path, kind, mode="r", offset=offset, shape=(count,))

    at = HEADER.size
    return DatasetIndex(
        prefix=prefix,
        dtype=dtype,
        lengths=array(np.int32, sequences, at),
        pointers=array(np.int64, sequences, at + 4 * sequences),
        document_indices=array(np.int64, entries, at + 12 * sequences),
    )


def _check_bin(index: DatasetIndex) -> None:
    path = bin_path(index.prefix)
    size = path.stat().st_size
    first, last = index.document_indices[0], index.document_indices[-1]
    if first != 0 or last != index.sequences:
        raise UserError(
            f"{idx_path(index.prefix)}: the document index runs from {first} to {last}, expected "
            f"0 to {index.sequences} (the number of sequences). The file is damaged."
        )
    if size % index.dtype.itemsize:
        raise UserError(
            f"{path}: {size:,} bytes are not a multiple of the {index.dtype.itemsize} bytes of a "
            "token. The file is damaged: copy it again or rebuild it with preprocess_data."
        )
    if index.sequences == 0:
        return
    end = int(index.pointers[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
    if end > size:
        raise UserError(
            f"{path}: {size:,} bytes, but its index requires {end:,}. The file is truncated: copy "
            "it again or rebuild it with preprocess_data."
        )


def open_indexed_dataset(prefix: str | Path) -> Any:
    """Return megatron-core's IndexedDataset after the checks of :func:`read_index`.

    Imports torch.

    Raises:
        UserError: as :func:`read_index`.
    """
    read_index(prefix)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))


Mask = npt.NDArray[np.bool_]


def read_and_check_index(prefix: str | Path) -> DatasetIndex:
    """Open an .idx with :func:`read_index` and check every entry.

    Raises:
        UserError: as :func:`read_index`.
        DataError: as :func:`check_entries`.
    """
    index = read_index(prefix)
    check_entries(index)
    return index


def check_entries(index: DatasetIndex) -> None:
    """Check the lengths, pointers and documents of an index against each other and the .bin.

    Sequences must lie within the .bin, be aligned to tokens, and not overlap. They need not be in
    order or cover the .bin: the folds that ``split_folds`` writes do neither.

    Raises:
        DataError: an entry is damaged; the message names the first one.
    """
    size, total = index.dtype.itemsize, bin_path(index.prefix).stat().st_size
    in_order, end = True, 0
    for first, lengths, pointers in _chunks(index):
        _check(index, first, lengths < 0, "length {length} is negative", lengths, pointers)
        outside = (pointers < 0) | (pointers > total - lengths.astype(np.int64) * size)
        problem = (
            f"{{length}} tokens at byte {{pointer}} are outside the {total:,} bytes of the .bin"
        )
        _check(index, first, outside, problem, lengths, pointers)
        inside = pointers % size != 0
        _check(
            index,
            first,
            inside,
            "byte offset {pointer} is not aligned to a token",
            lengths,
            pointers,
        )
        ends = pointers + lengths.astype(np.int64) * size
        starts = np.concatenate(([end], ends[:-1]))
        in_order = in_order and bool((pointers >= starts).all())
        end = int(ends[-1])
    if not in_order:
        _check_overlap(index)
    _check_documents(index)


def _chunks(
    index: DatasetIndex,
) -> Iterator[tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
    for first in range(0, index.sequences, CHUNK):
        part = slice(first, first + CHUNK)
        yield first, np.asarray(index.lengths[part]), np.asarray(index.pointers[part])


def _check(
    index: DatasetIndex, first: int, wrong: Mask, problem: str, lengths: Any, pointers: Any
) -> None:
    """Raise DataError for the first sequence of a chunk for which ``wrong`` is set."""
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        found = problem.format(length=f"{lengths[at]:,}", pointer=f"{pointers[at]:,}")
        _refuse(index, f"sequence {first + at:,}: {found}")


def _check_overlap(index: DatasetIndex) -> None:
    """Raise DataError if two sequences overlap; needed only for an index that is not in order."""
    filled = np.flatnonzero(index.lengths)
    order = filled[np.argsort(index.pointers[filled], kind="stable")]
    starts = index.pointers[order]
    ends = starts + index.lengths[order].astype(np.int64) * index.dtype.itemsize
    shared = starts[1:] < ends[:-1]
    if shared.any():
        at = int(np.flatnonzero(shared)[0])
        one, other = sorted((int(order[at]), int(order[at + 1])))
        _refuse(index, f"sequences {one:,} and {other:,} overlap in the .bin")


def _check_documents(index: DatasetIndex) -> None:
    for first in range(0, index.documents, CHUNK):
        ends = np.asarray(index.document_indices[first : first + CHUNK + 1])
        if (ends[1:] < ends[:-1]).any():
            at = int(np.flatnonzero(ends[1:] < ends[:-1])[0])
            _refuse(
                index, f"document {first + at:,} begins at sequence {ends[at]:,} and ends before it"
            )


def _refuse(index: DatasetIndex, problem: str) -> NoReturn:
    raise DataError(
        f"{idx_path(index.prefix)}: {problem}. The index is damaged or belongs to another .bin: "
        "copy both files again, or rebuild the dataset with preprocess_data."
    )
