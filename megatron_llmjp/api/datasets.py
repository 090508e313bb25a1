"""Tokenizers and indexed datasets."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.api.errors import OutOfRangeError, raises_user_errors
from megatron_llmjp.data.indexed_dataset import DatasetIndex, read_and_check_index
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer
from megatron_llmjp.tokenizers import load_tokenizer as _load_tokenizer


@raises_user_errors
def load_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | PathLike[str] | None = None,
    *,
    vocab_size: int | None = None,
    merge_file: str | PathLike[str] | None = None,
) -> Tokenizer:
    """Load a tokenizer by Megatron-LM's flags of these names.

    Args:
        tokenizer_type: such as ``SentencePieceTokenizer`` or ``HuggingFaceTokenizer``.
        tokenizer_model: its file or folder.
        vocab_size: for types that require it.
        merge_file: for GPT2BPETokenizer.

    Raises:
        UserError: the type is unknown, or a file is missing or damaged.

    Example:
        >>> tokenizer = ml.load_tokenizer("ByteLevelTokenizer")
        >>> tokenizer.encode("abc").tolist()
        [97, 98, 99]
        >>> tokenizer.decode([97, 98, 99])
        'abc'
    """
    model = None if tokenizer_model is None else Path(tokenizer_model)
    merges = None if merge_file is None else Path(merge_file)
    return _load_tokenizer(tokenizer_type, model, vocab_size=vocab_size, merge_file=merges)


class Dataset:
    """The documents of an indexed dataset, as token ids; tokens are read when they are used.

    Attributes:
        path: without ``.bin`` and ``.idx``.
        tokenizer: for :meth:`text`; None if none was given.

    Example:
        >>> dataset = ml.open_dataset("data/ja_text_document")
        >>> [len(document) for document in dataset][:2]
        [25, 49]
    """

    def __init__(self, index: DatasetIndex, tokenizer: Tokenizer | None) -> None:
        self.path = index.prefix
        self.tokenizer = tokenizer
        self._index, self._tokens = index, index.read_tokens()

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self._index.tokens

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored ids."""
        return self._index.dtype

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._index.documents

    def __repr__(self) -> str:
        return f"Dataset('{self.path}', documents={len(self):,}, tokens={self.tokens:,})"

    def __getitem__(self, document: int) -> npt.NDArray[Any]:
        """Return the ids ``[n]`` of a document, counted from 0; -1 is the last one.

        Raises:
            OutOfRangeError: there is no such document.
        """
        number = document + len(self) if document < 0 else document
        if not 0 <= number < len(self):
            raise OutOfRangeError(
                f"document {document}: {self.path} has documents 0 to {len(self) - 1:,}"
            )
        first, end = map(int, self._index.document_indices[number : number + 2])
        if first == end:
            return np.empty(0, self.dtype)
        start = int(self._index.pointers[first]) // self.dtype.itemsize
        count = int(self._index.lengths[first:end].sum(dtype=np.int64))
        return np.array(self._tokens[start : start + count])

    @raises_user_errors
    def text(self, document: int) -> str:
        """Return the text of a document.

        Raises:
            UserError: there is no such document, or no tokenizer.

        Example:
            >>> tokenizer = ml.load_tokenizer("ByteLevelTokenizer")
            >>> ml.open_dataset("data/ja_text_document", tokenizer).text(0)[:8]
            '吾輩は猫である。'
        """
        if self.tokenizer is None:
            raise UserError(
                f"{self.path}: text requires a tokenizer: open_dataset(path, "
                "load_tokenizer(TYPE, MODEL))"
            )
        return self.tokenizer.decode(self[document])


@raises_user_errors
def open_dataset(path: str | PathLike[str], tokenizer: Tokenizer | None = None) -> Dataset:
    """Open and check an indexed dataset.

    Args:
        path: with or without ``.bin`` or ``.idx``.
        tokenizer: to read documents as text.

    Raises:
        UserError: a file is missing or damaged.

    Example:
        >>> dataset = ml.open_dataset("data/ja_text_document")
        >>> dataset
        Dataset('data/ja_text_document', documents=60, tokens=2,220)
        >>> dataset[0][:4]
        array([229, 144, 190, 232], dtype=uint16)
    """
    prefix = str(path).removesuffix(".idx").removesuffix(".bin")
    return Dataset(read_and_check_index(prefix), tokenizer)
