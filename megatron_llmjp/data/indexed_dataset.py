"""Indexed datasets: the ``.bin`` and ``.idx`` files of Megatron-LM, read and checked.

Megatron's indexed datasets: ``<prefix>.bin`` (tokens) and ``<prefix>.idx`` (where they are).

Format, little endian, from megatron-core ``datasets/indexed_dataset.py``:

.bin: the tokens of all sequences, nothing else.
.idx: ``MMIDIDX\0\0`` (9 bytes), u64 version = 1, u8 dtype code, u64 sequences S, u64 entries D
of the document index, int32[S] lengths in tokens, int64[S] offsets in bytes, int64[D] document
index (0, then the number of sequences up to and with each document: documents = D - 1).

Reading goes through megatron-core's IndexedDataset (``open_indexed_dataset``), after checks that it
lacks: it opens a truncated .bin without a word. ``indexed_writer.py`` writes.

Checks of every entry of an index against the .bin, in constant memory.

An index that is damaged between its first and its last entry gives tokens of other documents, or
an error in the middle of a run. Reading 20 bytes per sequence, these checks are made when a
dataset is first used by a run (``facts.py`` remembers it) and by every data tool. Without torch.
"""

from __future__ import annotations

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

NO_IDS = np.dtype(np.float32)


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the tokens of a dataset."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the index of a dataset."""
    return Path(f"{prefix}.idx")


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type in which Megatron stores ids of this vocabulary: uint16 below 65,500.

    ``vocab_size`` is the largest id plus one: Megatron-LM takes the number of tokens, and writes
    wrong ids where these have gaps.
    """
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


@dataclass(frozen=True)
class DatasetIndex:
    """What an .idx says. The arrays are memory-mapped: opening reads a few pages only.

    Attributes:
        lengths: tokens of each sequence.
        pointers: offset of each sequence in the .bin, in bytes.
        document_indices: first sequence of each document, and at the end their number.
    """

    prefix: Path
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]

    @property
    def sequences(self) -> int:
        """Number of sequences (one per document, but for datasets cut into sentences)."""
        return len(self.lengths)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens; reads all lengths."""
        return int(self.lengths.sum(dtype=np.int64))

    def read_tokens(self) -> npt.NDArray[Any]:
        """Return the whole .bin, memory-mapped."""
        path = bin_path(self.prefix)
        if path.stat().st_size == 0:
            return np.empty(0, self.dtype)
        return np.memmap(path, self.dtype, mode="r")


def read_index(prefix: str | Path) -> DatasetIndex:
    """Open an .idx and check it against itself and its .bin, in constant time.

    Raises:
        UserError: a file is missing, no index of this format, truncated, or the .bin is too
            short for it.
    """
    path = _existing(prefix)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(
            f"{path}: not a Megatron index (starts with {head[:9]!r}, expected {MAGIC!r}). "
            "Make the dataset again with preprocess_data."
        )
    _, version, code, sequences, entries = HEADER.unpack(head)
    if version != VERSION or DTYPES.get(code, NO_IDS).kind not in "iu" or entries < 1:
        raise UserError(
            f"{path}: damaged header (version {version}, dtype code {code}, {entries} document "
            f"entries). Expected version {VERSION}, the code of an integer dtype (1 to 5, 8) and "
            "at least one entry."
        )
    expected = HEADER.size + 12 * sequences + 8 * entries
    # A multimodal index carries one more byte per sequence; nothing here needs it.
    if size not in (expected, expected + sequences):
        raise UserError(
            f"{path}: {size:,} bytes, expected {expected:,} for {sequences:,} sequences and "
            f"{entries - 1:,} documents. The file is truncated or damaged: copy it again or make "
            "it again with preprocess_data."
        )
    index = _map(Path(prefix), path, DTYPES[code], sequences, entries)
    _check_bin(index)
    return index


def _text_file(path: str) -> str | None:
    """The path without its suffixes, if they are those of preprocess_data's input."""
    for suffix in (".jsonl", ".json", ".parquet"):
        for packed in ("", ".gz", ".zst", ".bz2", ".xz"):
            if path.endswith(suffix + packed):
                return path.removesuffix(suffix + packed)
    return None


def _existing(prefix: str | Path) -> Path:
    path = idx_path(prefix)
    for missing, other in ((path, bin_path(prefix)), (bin_path(prefix), path)):
        if missing.is_file():
            continue
        hint = "Expected the path without .bin or .idx, such as data/ja_text_document."
        if text := _text_file(str(prefix)):
            hint = (
                f"{prefix} is text, and datasets hold tokens. Make one, and give its path: "
                f"preprocess_data --input {prefix} --output-prefix {text} --append-eod "
                f"--tokenizer-type TYPE --tokenizer-model MODEL makes {text}_text_document"
            )
        if str(prefix).endswith((".bin", ".idx")):
            hint = f"Give the path without its suffix: {str(prefix)[:-4]}"
        elif other.is_file():
            hint = f"{other} is there: the dataset is incomplete. Run preprocess_data again."
        raise UserError(f"{missing}: no such file. {hint}")
    return path


def _map(
    prefix: Path, path: Path, dtype: np.dtype[Any], sequences: int, entries: int
) -> DatasetIndex:
    def array(kind: type, count: int, offset: int) -> npt.NDArray[Any]:
        if count == 0:  # nothing can be mapped
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
    first, last = index.document_indices[0], index.document_indices[-1]
    if first != 0 or last != index.sequences:
        raise UserError(
            f"{idx_path(index.prefix)}: the document index runs from {first} to {last}, expected "
            f"0 to {index.sequences} (the number of sequences). The file is damaged."
        )
    if index.sequences == 0:
        return
    end = int(index.pointers[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
    if end > path.stat().st_size:
        raise UserError(
            f"{path}: {path.stat().st_size:,} bytes, but its index needs {end:,}. The file is "
            "truncated: copy it again or make it again with preprocess_data."
        )


def token_count(prefix: str | Path) -> int:
    """Return the number of tokens of a dataset.

    Raises:
        UserError: as read_index.
    """
    return read_index(prefix).tokens


def open_indexed_dataset(prefix: str | Path) -> Any:
    """Return megatron-core's IndexedDataset of this prefix, after the checks of read_index.

    Imports torch. Raises UserError as read_index.
    """
    read_index(prefix)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))


CHUNK = 1 << 20  # entries at a time

Mask = npt.NDArray[np.bool_]


def read_and_check_index(prefix: str | Path) -> DatasetIndex:
    """Open an .idx as :func:`read_index` does, and check every entry.

    Raises:
        UserError: as read_index.
        DataError: an entry is damaged; it is named.
    """
    index = read_index(prefix)
    check_entries(index)
    return index


def check_entries(index: DatasetIndex) -> None:
    """Check lengths, pointers and documents of an index against each other and the .bin.

    Sequences must be in the .bin, at whole tokens, and share no token; they need not be in order
    nor cover the .bin, as those of a fold do not.

    Raises:
        DataError: an entry is damaged; the first such is named.
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
        _check(index, first, inside, "byte {pointer} is inside a token", lengths, pointers)
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
    """Raise for the first sequence of a chunk for which ``wrong`` is set."""
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        found = problem.format(length=f"{lengths[at]:,}", pointer=f"{pointers[at]:,}")
        _refuse(index, f"sequence {first + at:,}: {found}")


def _check_overlap(index: DatasetIndex) -> None:
    """Raise if two sequences share a token; only for an index that is not in order."""
    filled = np.flatnonzero(index.lengths)
    order = filled[np.argsort(index.pointers[filled], kind="stable")]
    starts = index.pointers[order]
    ends = starts + index.lengths[order].astype(np.int64) * index.dtype.itemsize
    shared = starts[1:] < ends[:-1]
    if shared.any():
        at = int(np.flatnonzero(shared)[0])
        one, other = sorted((int(order[at]), int(order[at + 1])))
        _refuse(index, f"sequences {one:,} and {other:,} hold the same tokens of the .bin")


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
        "copy both files again, or make the dataset again with preprocess_data."
    )
