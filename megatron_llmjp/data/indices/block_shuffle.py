"""One epoch of a dataset in a block-wise shuffled order that is computed, not stored.

An epoch of ``shuffle: blocks`` is defined as follows (seed: that of the epoch):

1. The sequences (documents) of a dataset form blocks of 4,096 in the order of the file. The blocks
   are shuffled, and the sequences within each block are shuffled.
2. The tokens in this order are cut into rows of ``sequence_length`` tokens; each row also has the
   first token of the next one, which is its last label.
3. The rows are shuffled over the whole epoch: sample ``k`` is row ``permutation(k)``.

A sample is located by the token counts of the blocks (8 bytes per block, ``data/block_tokens.py``)
and the lengths of the sequences in its block, which are read when they are needed. megatron-core's
order (``epoch_index.py``) shuffles all documents with one generator, so that the first sample
depends on all documents; here it depends on one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_llmjp.data.block_tokens import SEQUENCES_PER_BLOCK, BlockTokens, block_range
from megatron_llmjp.data.indexed_dataset import idx_path
from megatron_llmjp.data.indices.permutation import Permutation, derive_keys, hashed_order
from megatron_llmjp.data.token_reader import TokenReader
from megatron_llmjp.errors import DataError


class SequenceSpan(NamedTuple):
    """Consecutive tokens of one sequence."""

    sequence: int
    first_token: int
    tokens: int


class _Block(NamedTuple):
    sequences: npt.NDArray[np.int64]
    """Numbers of the sequences of a block, shuffled."""
    ends: npt.NDArray[np.int64]
    """Tokens up to the end of each of them, counted from the start of the block."""


class BlockShuffle:
    """Order of the tokens of an epoch (steps 1 and 2)."""

    def __init__(self, reader: TokenReader, block_tokens: BlockTokens, seed: int) -> None:
        if len(block_tokens) != -(-len(reader) // SEQUENCES_PER_BLOCK):
            raise DataError(
                f"{idx_path(reader.path_prefix)}: {len(reader):,} sequences, but the token counts "
                f"of {len(block_tokens):,} blocks: the dataset was changed. Start the run again"
            )
        self._reader = reader
        self._tokens = block_tokens
        blocks_key, self._key = derive_keys(seed, "documents", 2)
        self._order = hashed_order(0, len(block_tokens), blocks_key)
        self._starts = np.concatenate(([0], np.cumsum(block_tokens[self._order])))

    @property
    def total(self) -> int:
        """Number of tokens of the epoch."""
        return int(self._starts[-1])

    def spans(self, first: int, end: int) -> Iterator[SequenceSpan]:
        """Yield the sequences of the tokens ``[first, end)`` of the epoch, in order.

        Raises:
            DataError: the dataset has changed or is damaged.
        """
        place = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < end:
            start, stop = (int(at) for at in self._starts[place : place + 2])
            if start < stop:
                block = self._block(int(self._order[place]))
                yield from _spans_within(block, first - start, min(end, stop) - start)
                first = stop
            place += 1

    def token_range(self, sequence: int) -> tuple[int, int]:
        """Return the tokens ``[first, end)`` of the epoch that a sequence provides."""
        number = sequence // SEQUENCES_PER_BLOCK
        block = self._block(number)
        inside = int(np.flatnonzero(block.sequences == sequence)[0])
        start = int(self._starts[np.flatnonzero(self._order == number)[0]])
        before = int(block.ends[inside - 1]) if inside else 0
        return start + before, start + int(block.ends[inside])

    def _block(self, number: int) -> _Block:
        first, end = block_range(number, len(self._reader))
        lengths = self._reader.sequence_lengths[first:end]
        sequences = hashed_order(first, end, self._key)
        ends = np.cumsum(lengths[sequences - first], dtype=np.int64)
        if lengths.min() < 0 or ends[-1] != self._tokens[number]:
            raise DataError(
                f"{idx_path(self._reader.path_prefix)}: sequences {first:,} to {end - 1:,} have "
                f"{ends[-1]:,} tokens instead of {self._tokens[number]:,}: the dataset was changed "
                "during the run, or its index is damaged. Restore it, or start the run again"
            )
        return _Block(sequences, ends)


def _spans_within(block: _Block, first: int, end: int) -> Iterator[SequenceSpan]:
    """Yield the sequences of the tokens ``[first, end)`` of a block."""
    place = int(np.searchsorted(block.ends, first, side="right"))
    start = int(block.ends[place - 1]) if place else 0
    while first < end:
        stop = int(block.ends[place])
        if first < stop:
            count = min(end, stop) - first
            yield SequenceSpan(int(block.sequences[place]), first - start, count)
            first += count
        start, place = stop, place + 1


class BlockShuffledEpoch(GPTDataset):
    """Samples of an epoch; megatron-core's GPTDataset makes them from the tokens."""

    def __init__(
        self, reader: TokenReader, block_tokens: BlockTokens, seed: int, config: GPTDatasetConfig
    ) -> None:
        """Open an epoch; nothing is read before a sample is."""
        self._shuffle = BlockShuffle(reader, block_tokens, seed)
        self._length = int(config.sequence_length)
        self._rows = Permutation(max(0, self._shuffle.total - 1) // self._length, seed)
        super().__init__(reader, "", np.empty(0, np.int32), None, Split.train, config)

    def __len__(self) -> int:
        return self._rows.size

    def sequence_spans(self, sample: int) -> list[SequenceSpan]:
        """Return the parts of sequences that form a sample, with its last label, in order."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self):,}")
        first = self._rows.image(int(sample)) * self._length
        return list(self._shuffle.spans(first, first + self._length + 1))

    def samples_containing(self, sequences: range) -> npt.NDArray[np.int64]:
        """Return the numbers of the samples that contain a token of these sequences, ascending."""
        rows: set[int] = set()
        for first, end in map(self._shuffle.token_range, sequences):
            if first < end:  # row r has the tokens from r * length to (r + 1) * length, inclusive
                low = max(0, -(-(first - self._length) // self._length))
                rows.update(range(low, min((end - 1) // self._length + 1, len(self))))
        return np.sort(self._rows.preimages(np.array(sorted(rows), np.int64)))

    def _build_document_sample_shuffle_indices(self) -> tuple[None, None, None]:
        """Replace megatron-core's arrays, which :meth:`sequence_spans` computes."""
        return None, None, None

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, Any]:
        """Return the tokens of a sample with its last label, int64 ``[s + 1]``, and its sequences.

        A hook of megatron-core's GPTDataset.
        """
        spans = self.sequence_spans(idx)
        tokens = [self.dataset.get(*span) for span in spans]
        return np.concatenate(tokens, dtype=np.int64), np.array([s.sequence for s in spans])
