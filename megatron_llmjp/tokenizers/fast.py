"""Encoding with the ``tokenizers`` library, for every type that is built on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers

from megatron_llmjp.tokenizers.base import Ids, Tokenizer


class FastTokenizer(Tokenizer):
    """A tokenizer of the library, to which no special tokens are added.

    Attributes:
        tokenizer: the library's object.
    """

    tokenizer: tokenizers.Tokenizer

    def encode(self, text: str) -> Ids:
        """Return the ids of one text, without what the tokenizer's template would add."""
        _refuse_surrogates(text)
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, encoded together."""
        for text in texts:
            _refuse_surrogates(text)
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text, special tokens included."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def piece(self, token_id: int) -> str:
        """Return the token of one id, as it stands in the vocabulary."""
        return str(self.tokenizer.id_to_token(int(token_id)))


def _refuse_surrogates(text: str) -> None:
    text.encode()  # the library's own error for a lone surrogate is a bare TypeError
