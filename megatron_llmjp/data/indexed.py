"""Megatron's indexed datasets: ``<prefix>.bin`` (tokens) and ``<prefix>.idx`` (where they are).

Format, little endian, from megatron-core ``datasets/indexed_dataset.py``:

.bin: the tokens of all sequences, nothing else.
.idx: ``MMIDIDX\\0\\0`` (9 bytes), u64 version = 1, u8 dtype code, u64 sequences S, u64 entries D
of the document index, int32[S] lengths in tokens, int64[S] offsets in bytes, int64[D] document
index (0, then the number of sequences up to and with each document: documents = D - 1).

Reading goes through megatron-core's IndexedDataset (``open_indexed``), after checks that it
lacks: it opens a truncated .bin without a word. Writing is done here: megatron-core's
IndexedDatasetBuilder imports torch and keeps every length in a Python list.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_llmjp.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    code: np.dtype(name)
    for code, name in enumerate(
        ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1
    )
}
CHUNK = 1 << 20  # sequences handled at a time when an index is written


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the tokens of a dataset."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the index of a dataset."""
    return Path(f"{prefix}.idx")


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type in which Megatron stores ids of this vocabulary: uint16 below 65,500."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


@dataclass(frozen=True)
class Index:
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


def read_index(prefix: str | Path) -> Index:
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
    if version != VERSION or code not in DTYPES or entries < 1:
        raise UserError(
            f"{path}: damaged header (version {version}, dtype code {code}, {entries} document "
            f"entries). Expected version {VERSION}, a dtype code of 1 to 8, at least one entry."
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


def _existing(prefix: str | Path) -> Path:
    path = idx_path(prefix)
    for missing, other in ((path, bin_path(prefix)), (bin_path(prefix), path)):
        if missing.is_file():
            continue
        hint = "Expected the path without .bin or .idx, such as data/ja_text_document."
        if str(prefix).endswith((".bin", ".idx")):
            hint = f"Give the path without its suffix: {str(prefix)[:-4]}"
        elif other.is_file():
            hint = f"{other} is there: the dataset is incomplete. Run preprocess_data again."
        raise UserError(f"{missing}: no such file. {hint}")
    return path


def _map(prefix: Path, path: Path, dtype: np.dtype[Any], sequences: int, entries: int) -> Index:
    def array(kind: type, count: int, offset: int) -> npt.NDArray[Any]:
        if count == 0:  # nothing can be mapped
            return np.empty(0, kind)
        return np.memmap(path, kind, mode="r", offset=offset, shape=(count,))

    at = HEADER.size
    return Index(
        prefix=prefix,
        dtype=dtype,
        lengths=array(np.int32, sequences, at),
        pointers=array(np.int64, sequences, at + 4 * sequences),
        document_indices=array(np.int64, entries, at + 12 * sequences),
    )


def _check_bin(index: Index) -> None:
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


def open_indexed(prefix: str | Path) -> Any:
    """Return megatron-core's IndexedDataset of this prefix, after the checks of read_index.

    Imports torch. Raises UserError as read_index.
    """
    read_index(prefix)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))


@dataclass(frozen=True)
class Position:
    """How far a writer has come, and the CRC-32 of the .bin up to there.

    CRC-32 finds any accidental damage that matters and runs at 3 GB/s; SHA-256, at 0.4 GB/s on
    many machines, would hold up the one process that writes what dozens of workers encode.
    """

    bin_bytes: int = 0
    sequences: int = 0
    documents: int = 0
    crc: int = 0


class IndexedWriter:
    """Writes a .bin as documents arrive, and its .idx at the end, in constant memory.

    Lengths are kept beside the .bin in ``.lengths`` and ``.documents`` files until then, so that
    a killed program can go on from the last ``sync``.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], resume_at: Position | None = None) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.position = resume_at or Position()
        self._bin = _open_at(path, self.position.bin_bytes)
        self._lengths = _open_at(path.with_suffix(".lengths"), 4 * self.position.sequences)
        self._documents = _open_at(path.with_suffix(".documents"), 4 * self.position.documents)

    def add(
        self,
        tokens: npt.NDArray[Any],
        lengths: npt.NDArray[np.int32],
        sequences: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Append documents.

        Args:
            tokens: ids of all sequences end to end, of this writer's dtype.
            lengths: tokens of each sequence.
            sequences: sequences of each document; one each where left out.
        """
        if tokens.dtype != self.dtype:
            raise TypeError(f"tokens are {tokens.dtype}, the dataset is {self.dtype}")
        if sequences is None:
            sequences = np.ones(len(lengths), np.int32)
        data = np.ascontiguousarray(tokens).view(np.uint8).data
        self._bin.write(data)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._documents.write(sequences.astype("<i4").tobytes())
        self.position = Position(
            self.position.bin_bytes + len(data),
            self.position.sequences + len(lengths),
            self.position.documents + len(sequences),
            zlib.crc32(data, self.position.crc),
        )

    def sync(self) -> Position:
        """Bring everything to disk and return the position to resume at."""
        for file in (self._bin, self._lengths, self._documents):
            file.flush()
            os.fsync(file.fileno())
        return self.position

    def close(self) -> None:
        """Close the files; nothing is removed."""
        for file in (self._bin, self._lengths, self._documents):
            file.close()

    def finish(self, idx: Path) -> int:
        """Close the .bin and write its .idx, whose CRC-32 is returned.

        The helper files stay, so that a program killed here can do it again: see clean.
        """
        self.sync()
        self.close()
        lengths, documents = self.path.with_suffix(".lengths"), self.path.with_suffix(".documents")
        return write_idx(idx, self.dtype, lengths, documents)

    def clean(self) -> None:
        """Remove the helper files."""
        for suffix in (".lengths", ".documents"):
            self.path.with_suffix(suffix).unlink()


def write_idx(
    path: Path,
    dtype: np.dtype[Any],
    lengths: npt.NDArray[np.int32] | Path,
    sequences_per_document: npt.NDArray[np.int32] | Path,
    pointers: npt.NDArray[np.int64] | None = None,
) -> int:
    """Write an .idx and return its CRC-32.

    Lengths and sequences are arrays, or files of int32 which are read chunk by chunk. Without
    ``pointers`` the sequences follow each other in the .bin.
    """
    crc = 0
    with path.open("wb") as file:

        def put(data: bytes) -> None:
            nonlocal crc
            file.write(data)
            crc = zlib.crc32(data, crc)

        code = next(code for code, known in DTYPES.items() if known == dtype)
        put(HEADER.pack(MAGIC, VERSION, code, _count(lengths), _count(sequences_per_document) + 1))
        for part in _chunks(lengths):
            put(part.astype("<i4").tobytes())
        if pointers is None:
            offset = 0
            for part in _chunks(lengths):
                ends = offset + np.cumsum(part, dtype=np.int64) * dtype.itemsize
                put((ends - part.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
                offset = int(ends[-1])
        else:
            for at in _chunks(pointers):
                put(at.astype("<i8").tobytes())
        put(struct.pack("<q", 0))
        total = 0
        for part in _chunks(sequences_per_document):
            ends = total + np.cumsum(part, dtype=np.int64)
            put(ends.astype("<i8").tobytes())
            total = int(ends[-1])
        file.flush()
        os.fsync(file.fileno())
    return crc


def _count(numbers: npt.NDArray[Any] | Path) -> int:
    return numbers.stat().st_size // 4 if isinstance(numbers, Path) else len(numbers)


def _chunks(numbers: npt.NDArray[Any] | Path) -> Iterator[npt.NDArray[Any]]:
    if not isinstance(numbers, Path):
        yield from (numbers[at : at + CHUNK] for at in range(0, len(numbers), CHUNK))
        return
    with numbers.open("rb") as file:
        while data := file.read(4 * CHUNK):
            yield np.frombuffer(data, "<i4")


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open a file for appending at ``size``, cutting off what a killed program left behind."""
    if size == 0:
        return path.open("wb")
    if not path.is_file() or path.stat().st_size < size:
        raise UserError(
            f"{path}: is gone or shorter than the {size:,} bytes that were written to it. Give "
            "--overwrite to start again."
        )
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
