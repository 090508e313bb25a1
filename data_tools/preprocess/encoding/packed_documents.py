"""Tokens of consecutive documents in three arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.statistics.counts import document_lengths


@dataclass
class PackedDocuments:
    """Concatenated documents: ids, tokens per sequence, sequences per document."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int32]

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens per document."""
        return document_lengths(self.lengths, self.sequences)

    def take(self, chosen: npt.NDArray[np.int64]) -> PackedDocuments:
        """Return the chosen documents, in the order of their numbers in ``chosen``."""
        sequence_ends = np.concatenate(([0], np.cumsum(self.sequences, dtype=np.int64)))
        token_ends = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        first, end = sequence_ends[chosen], sequence_ends[chosen + 1]
        tokens = [self.tokens[a:b] for a, b in zip(token_ends[first], token_ends[end], strict=True)]
        lengths = [self.lengths[a:b] for a, b in zip(first, end, strict=True)]
        return PackedDocuments(
            np.concatenate(tokens) if tokens else self.tokens[:0],
            np.concatenate(lengths) if lengths else self.lengths[:0],
            self.sequences[chosen],
        )


def join_documents(parts: Sequence[PackedDocuments], dtype: np.dtype[Any]) -> PackedDocuments:
    """Return the documents of several parts in order."""
    return PackedDocuments(
        np.concatenate([np.empty(0, dtype), *(part.tokens for part in parts)]),
        np.concatenate([np.empty(0, np.int32), *(part.lengths for part in parts)]),
        np.concatenate([np.empty(0, np.int32), *(part.sequences for part in parts)]),
    )
