"""Tokenizers without a model file: UTF-8 bytes, and integers as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.base import Ids, Tokenizer


class ByteLevelTokenizer(Tokenizer):
    """One token per UTF-8 byte (ids 0 to 255); end of document is 256, padding 257."""

    kind = "ByteLevelTokenizer"
    vocab_size = 258
    eod_id = 256
    eos_id = 256
    pad_id = 257

    def encode(self, text: str) -> Ids:
        """Return the bytes of the text."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text; invalid UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")

    def piece(self, token_id: int) -> str:
        """Return ``<0x41>`` for a byte, a name for a special token."""
        names = {self.eod_id: "<EOD>", self.pad_id: "<PAD>"}
        return names.get(token_id, f"<0x{token_id:02X}>")


class NullTokenizer(Tokenizer):
    """Integers separated by spaces; end of document is ``vocab_size`` itself.

    As in Megatron-LM, ``--vocab-size 500`` means ids 0 to 499 in the text, 500 for the end of
    document, and a true vocabulary of 501.
    """

    kind = "NullTokenizer"

    def __init__(self, vocab_size: int) -> None:
        if not 0 < vocab_size < 2**31:
            raise UserError(f"--vocab-size {vocab_size}: expected a positive number below 2^31")
        self.vocab_size = vocab_size + 1
        self.eod_id = self.eos_id = vocab_size

    def encode(self, text: str) -> Ids:
        """Return the integers of the text.

        Raises:
            ValueError: a word is not an integer, or outside the vocabulary.
        """
        numbers = [int(word) for word in text.split()]
        if numbers and (min(numbers) < 0 or max(numbers) >= self.vocab_size):
            raise ValueError(f"an id is outside 0 to {self.vocab_size - 1}")
        return np.array(numbers, np.int32)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the integers separated by spaces."""
        return " ".join(str(int(i)) for i in ids)
