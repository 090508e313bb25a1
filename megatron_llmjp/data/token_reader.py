"""Reader of an indexed dataset through a bounded number of open files.

It replaces megatron-core's ``IndexedDataset`` in a ``GPTDataset``, which opens three files and two
memory maps per dataset for as long as the dataset is in use (``data/open_files.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.indexed_dataset import HEADER, bin_path, idx_path, read_index
from megatron_llmjp.data.open_files import OpenFiles, StoredArray


class TokenReader:
    """Sequences of one dataset; the attributes have the names of megatron-core's reader.

    Attributes:
        sequence_lengths: tokens per sequence, ``[S]``.
        sequence_pointers: byte offset of each sequence in the .bin, ``[S]``.
        document_indices: first sequence of each document, followed by S, ``[D + 1]``.
    """

    def __init__(self, prefix: str | Path, files: OpenFiles) -> None:
        """Check the header of a dataset, and read the rest through ``files``.

        Raises:
            UserError: as ``indexed_dataset.read_index``.
        """
        index = read_index(prefix)
        self.path_prefix = str(prefix)
        self.dtype = index.dtype
        self.files = files
        self._bin = str(bin_path(prefix))
        count, entries = index.sequences, len(index.document_indices)

        def array(kind: type, size: int, offset: int) -> StoredArray:
            where = HEADER.size + offset
            return StoredArray(files, idx_path(prefix), np.dtype(kind), (size,), where)

        self.sequence_lengths = array(np.int32, count, 0)
        self.sequence_pointers = array(np.int64, count, 4 * count)
        self.document_indices = array(np.int64, entries, 12 * count)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.sequence_lengths)

    def __getitem__(self, sequence: int) -> npt.NDArray[Any]:
        """Return the tokens of a sequence."""
        return self.get(sequence)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Return ``length`` tokens of sequence ``idx`` from token ``offset``.

        Raises:
            DataError: the .bin does not have them.
        """
        if length is None:
            length = int(self.sequence_lengths[idx]) - offset
        return self.read(int(self.sequence_pointers[idx]), offset, int(length))

    def read(self, pointer: int, offset: int, length: int) -> npt.NDArray[Any]:
        """Return ``length`` tokens from token ``offset`` of the sequence at byte ``pointer``."""
        size = self.dtype.itemsize
        read = self.files.read(self._bin, pointer + offset * size, length * size)
        return np.frombuffer(read, self.dtype)

    def document_of(self, sequence: int) -> int:
        """Return the document that contains a sequence: the last one that starts at or before."""
        low, high = 0, len(self.document_indices)
        while low < high:
            middle = (low + high) // 2
            if self.document_indices[middle] <= sequence:
                low = middle + 1
            else:
                high = middle
        return low - 1
