"""Tokens per block of consecutive sequences: all that a block-wise shuffle stores of a dataset.

Counting them reads the lengths of all sequences once, in order: 4 bytes per sequence. The counts
take 8 bytes per 4,096 sequences, and are cached with the other facts about the dataset
(``folds/datasets.py``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_llmjp.data.indexed_dataset import HEADER, DatasetIndex, check_entries, idx_path
from megatron_llmjp.errors import DataError

SEQUENCES_PER_BLOCK = 4096
"""Part of the sample order of ``shuffle: blocks``: it must not change."""

_CHUNK = 256 * SEQUENCES_PER_BLOCK

BlockTokens = npt.NDArray[np.int64]


def count_block_tokens(index: DatasetIndex) -> BlockTokens:
    """Return the tokens of each block of a dataset, ``[blocks]``; the last block may be shorter.

    Raises:
        DataError: a length is negative.
    """
    counts = []
    # Read, not mapped: a page fault per 4 KiB is slower than a copy.
    with idx_path(index.prefix).open("rb", buffering=0) as stream:
        stream.seek(HEADER.size)
        for first in range(0, index.sequences, _CHUNK):
            size = min(_CHUNK, index.sequences - first)
            lengths = np.fromfile(stream, np.int32, size)
            if len(lengths) < size or lengths.min() < 0:
                check_entries(index)  # raises the error that names the sequence
                raise DataError(f"{idx_path(index.prefix)}: changed while it was read")
            starts = np.arange(0, size, SEQUENCES_PER_BLOCK)
            counts.append(np.add.reduceat(lengths, starts, dtype=np.int64))
    return np.concatenate(counts) if counts else np.empty(0, np.int64)


def block_range(block: int, sequences: int) -> tuple[int, int]:
    """Return the sequences ``[first, end)`` of a block of a dataset."""
    first = block * SEQUENCES_PER_BLOCK
    return first, min(first + SEQUENCES_PER_BLOCK, sequences)
