"""Encoding with gigatoken, a fast library for the BPE tokenizers of tokenizer.json files."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data_tools.preprocess.encoding.new_characters import has_new_characters
from megatron_llmjp.tokenizers import Tokenizer
from megatron_llmjp.tokenizers.base import Ids, panics_as_errors
from megatron_llmjp.tokenizers.hugging_face import FastTokenizer

MAX_CACHE_BYTES = 512 << 20
"""Growth in memory after which the cache of encoded words, which has no limit, is discarded."""


CHARACTERS_BETWEEN_CHECKS = 4 << 20
"""Number of characters after which the memory is measured, which takes as long as encoding some."""


class UnsupportedTokenizerError(ValueError):
    """A tokenizer that gigatoken does not read, with the reason."""


class GigatokenTokenizer(Tokenizer):
    """Tokenizer that encodes with gigatoken, and otherwise acts as the original one.

    Texts with characters that the libraries classify differently are encoded by the original.
    """

    def __init__(self, original: FastTokenizer) -> None:
        """Load the tokenizer into gigatoken.

        Raises:
            ImportError: gigatoken is not installed.
            UnsupportedTokenizerError: gigatoken does not read this tokenizer.
        """
        self.original = original
        self.kind, self.vocab_size = original.kind, original.vocab_size
        self.eod_id, self.eos_id = original.eod_id, original.eos_id
        self.bos_id, self.pad_id = original.bos_id, original.pad_id
        if original.tokenizer.encode_special_tokens:
            raise UnsupportedTokenizerError("split_special_tokens is set")
        self._gigatoken: Any = importlib.import_module("gigatoken")
        self.library = f"gigatoken {metadata.version('gigatoken')}"
        self._load()

    def _load(self) -> None:
        try:
            with panics_as_errors():
                loaded = self._gigatoken.Tokenizer.from_json(self.original.tokenizer.to_str())
        except Exception as error:  # the library raises several types
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UnsupportedTokenizerError(reason) from error
        self._encode = loaded.backend.encode
        self._memory_at_start: int | None = None
        self._characters = 0  # encoded since the memory was measured

    def encode(self, text: str) -> Ids:
        """Return the ids of a text; a text that gigatoken fails on is encoded by the original."""
        try:
            with panics_as_errors():
                return self._ids(text)
        except UnicodeEncodeError:  # a lone surrogate
            raise
        except ValueError:
            return self.original.encode(text)

    def _ids(self, text: str) -> Ids:
        if text.isascii():
            return self.original.add_special_tokens(self._encode(text).view(np.int32))
        utf8 = text.encode()  # faster than the library's own conversion
        if has_new_characters(utf8):
            return self.original.encode(text)
        return self.original.add_special_tokens(self._encode(utf8).view(np.int32))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text."""
        self._characters += sum(map(len, texts))
        if self._characters >= CHARACTERS_BETWEEN_CHECKS or self._memory_at_start is None:
            self._characters = 0
            self._limit_memory()
        try:
            with panics_as_errors():
                return [self._ids(text) for text in texts]
        except ValueError:
            return [self.encode(text) for text in texts]

    def _limit_memory(self) -> None:
        """Discard the cache if the memory of this process, maybe a fork, has grown."""
        memory = psutil.Process().memory_info().rss
        if self._memory_at_start is None:
            self._memory_at_start = memory
        elif memory - self._memory_at_start > MAX_CACHE_BYTES:
            self._load()

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Decode with the original tokenizer."""
        return self.original.decode(ids)

    def piece(self, token_id: int) -> str:
        """Return the token of one id as in the vocabulary."""
        return self.original.piece(token_id)

    def files(self) -> dict[str, Path]:
        """Return the files of the original tokenizer."""
        return self.original.files()

    def identity(self) -> dict[str, Any]:
        """Return the identity of the original tokenizer: the ids are the same."""
        return self.original.identity()
