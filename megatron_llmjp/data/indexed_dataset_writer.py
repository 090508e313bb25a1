"""Writer of Megatron-LM's indexed datasets, in constant memory and without torch.

``indexed_dataset.py`` describes the format. megatron-core's IndexedDatasetBuilder is not used: it
imports torch and keeps every sequence length in a Python list.
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

from megatron_llmjp.data.indexed_dataset import DTYPES, HEADER, MAGIC, VERSION
from megatron_llmjp.errors import UserError

CHUNK = 1 << 20  # sequences processed at a time when an index is written


@dataclass(frozen=True)
class WriterPosition:
    """Amount of data a writer has written, and the CRC-32 of the .bin up to that point.

    CRC-32 detects accidental damage and runs at 3 GB/s. SHA-256, at 0.4 GB/s on many machines,
    would slow down the single process that writes the output of dozens of encoding workers.
    """

    bin_bytes: int = 0
    sequences: int = 0
    documents: int = 0
    crc: int = 0


class IndexedDatasetWriter:
    """Writes a .bin as documents are added, and its .idx at the end, in constant memory.

    Until then the lengths are stored next to the .bin in ``.lengths`` and ``.documents`` files, so
    that a killed program can resume from the last :meth:`sync`.
    """

    def __init__(
        self, path: Path, dtype: np.dtype[Any], resume_at: WriterPosition | None = None
    ) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.position = resume_at or WriterPosition()
        self._bin = open_at(path, self.position.bin_bytes)
        self._lengths = open_at(path.with_suffix(".lengths"), 4 * self.position.sequences)
        self._documents = open_at(path.with_suffix(".documents"), 4 * self.position.documents)

    def add(
        self,
        tokens: npt.NDArray[Any],
        lengths: npt.NDArray[np.int32],
        sequences: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Append documents.

        Args:
            tokens: concatenated ids of all sequences, in this writer's dtype.
            lengths: tokens per sequence.
            sequences: sequences per document; one each by default.

        Raises:
            TypeError: the tokens have another dtype.
        """
        if tokens.dtype != self.dtype:
            raise TypeError(f"expected tokens of dtype {self.dtype}, found {tokens.dtype}")
        if sequences is None:
            sequences = np.ones(len(lengths), np.int32)
        data = np.ascontiguousarray(tokens).view(np.uint8).data
        self._bin.write(data)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._documents.write(sequences.astype("<i4").tobytes())
        self.position = WriterPosition(
            self.position.bin_bytes + len(data),
            self.position.sequences + len(lengths),
            self.position.documents + len(sequences),
            zlib.crc32(data, self.position.crc),
        )

    def sync(self) -> WriterPosition:
        """Flush all files to disk and return the position to resume from."""
        for file in (self._bin, self._lengths, self._documents):
            file.flush()
            os.fsync(file.fileno())
        return self.position

    def close(self) -> None:
        """Close the files without removing any."""
        for file in (self._bin, self._lengths, self._documents):
            file.close()

    def finish(self, idx: Path) -> int:
        """Close the .bin, write its .idx and return the CRC-32 of the .idx.

        The helper files are kept, so that this step can be repeated if the program is killed;
        :meth:`clean` removes them.
        """
        self.sync()
        self.close()
        lengths, documents = self.path.with_suffix(".lengths"), self.path.with_suffix(".documents")
        return write_idx(idx, self.dtype, lengths, documents)

    def describe(self, idx_crc: int) -> dict[str, Any]:
        """Return the manifest entries that describe the .bin and .idx."""
        position = self.position
        return {
            "dtype": self.dtype.name,
            "documents": position.documents,
            "sequences": position.sequences,
            "tokens": position.bin_bytes // self.dtype.itemsize,
            "bin": {"bytes": position.bin_bytes, "crc32": f"{position.crc:08x}"},
            "idx": {"crc32": f"{idx_crc:08x}"},
        }

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

    Args:
        path: the .idx file.
        dtype: dtype of the tokens in the .bin.
        lengths: tokens per sequence: an array, or an int32 file that is read in chunks.
        sequences_per_document: as ``lengths``.
        pointers: byte offset of each sequence; by default the sequences are contiguous in the .bin.
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


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a file for appending at ``size``, truncating data of an interrupted write."""
    if size == 0:
        return path.open("wb")
    if not path.is_file() or path.stat().st_size < size:
        raise UserError(
            f"{path}: missing, or shorter than the {size:,} bytes written before. Give --overwrite "
            "to start from the beginning."
        )
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
