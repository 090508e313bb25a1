"""Packing of the ids of texts to documents: BOS, end of document, and the dtype of the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.preprocess.encoding.packed_documents import PackedDocuments
from megatron_llmjp.tokenizers import Tokenizer
from megatron_llmjp.tokenizers.base import Ids


class DocumentPacker:
    """Packs the ids of a block's texts in one array, without copies in between.

    A text without ids gives no sequence, as in Megatron-LM. BOS precedes the first sequence of a
    document, and the end of document follows its last one.
    """

    def __init__(
        self, tokenizer: Tokenizer, dtype: np.dtype[Any], append_eod: bool, append_bos: bool
    ) -> None:
        self._dtype, self._vocab_size = dtype, tokenizer.vocab_size
        self._eod = tokenizer.eod_id if append_eod else None
        self._bos = tokenizer.bos_id if append_bos else None

    def pack(
        self, ids: Sequence[Ids], texts: npt.NDArray[np.int64]
    ) -> tuple[PackedDocuments, tuple[int, int] | None]:
        """Concatenate the ids of documents; also return the first id outside the vocabulary.

        Args:
            ids: ids of each text.
            texts: number of texts of each document.

        Returns:
            The documents, and the number of a document with its wrong id, or None.
        """
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        owners = np.repeat(np.arange(len(texts)), texts)
        if not lengths.all():
            kept = np.flatnonzero(lengths)
            ids, lengths, owners = [ids[at] for at in kept.tolist()], lengths[kept], owners[kept]
        sequences = np.bincount(owners, minlength=len(texts)).astype(np.int32)
        if not len(lengths):
            return PackedDocuments(np.empty(0, self._dtype), lengths, sequences), None
        flat = np.concatenate(ids)
        before = np.zeros(len(lengths), np.int32)
        after = before.copy()
        if self._bos is not None:
            before[np.flatnonzero(np.diff(owners, prepend=-1))] = 1
        if self._eod is not None:
            after[np.flatnonzero(np.diff(owners, append=-1))] = 1
        wrong = self._find_invalid_id(flat, lengths, owners)
        total = lengths + before + after
        tokens = self._with_added(flat, lengths, before, after) if total.sum() > len(flat) else flat
        return PackedDocuments(tokens.astype(self._dtype, copy=False), total, sequences), wrong

    def _with_added(
        self,
        flat: Ids,
        lengths: npt.NDArray[np.int32],
        before: npt.NDArray[np.int32],
        after: npt.NDArray[np.int32],
    ) -> npt.NDArray[Any]:
        """Return the ids in the dtype of the file, with BOS and end of document."""
        total = lengths + before + after
        tokens = np.empty(int(total.sum(dtype=np.int64)), self._dtype)
        ends = np.cumsum(total, dtype=np.int64)
        is_text = np.ones(len(tokens), bool)
        if self._bos is not None:
            at = (ends - total)[before > 0]
            tokens[at], is_text[at] = self._bos, False
        if self._eod is not None:
            at = ends[after > 0] - 1
            tokens[at], is_text[at] = self._eod, False
        tokens[is_text] = flat
        return tokens

    def _find_invalid_id(
        self, flat: Ids, lengths: npt.NDArray[np.int32], owners: npt.NDArray[np.int64]
    ) -> tuple[int, int] | None:
        """Return the document number and the first id outside the vocabulary, or None."""
        unsigned = flat.view(np.uint32)  # negative ids are larger than any vocabulary
        if unsigned.max() < self._vocab_size:
            return None
        at = int(np.flatnonzero(unsigned >= self._vocab_size)[0])
        sequence = np.searchsorted(np.cumsum(lengths, dtype=np.int64), at, side="right")
        return int(owners[sequence]), int(flat[at])
