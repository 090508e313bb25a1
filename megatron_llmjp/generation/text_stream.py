"""Incremental detokenization: the text of each new token, without broken characters.

A character may consist of several tokens (bytes in UTF-8), and the text of a token may depend on
the ones before it (spaces of SentencePiece). New tokens are therefore decoded together with some of
those before them, and replacement characters at the end are held back until their bytes are known.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llmjp.tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, such as the first bytes of one."""
_CONTEXT = 8
"""Least number of earlier tokens that are decoded with new ones."""
_MAX_CONTEXT = 24
_WINDOW = 64
"""Tokens that are decoded together before the earlier ones are dropped."""


class TextStream:
    """The text of a continuation, token by token.

    Args:
        tokenizer: of the ids.
        prompt: ids before the continuation, whose text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._drop_earlier_ids()
        self._returned = len(self._decode(self._ids))

    def add(self, token_id: int) -> str:
        """Return the text that is complete with one more token; may be empty."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        new = text.rstrip(REPLACEMENT)[self._returned :]
        self._returned += len(new)
        if self._returned == len(text) and len(self._ids) > _WINDOW:
            self._drop_earlier_ids()
            self._returned = len(self._decode(self._ids))
        return new

    def finish(self) -> str:
        """Return the rest of the text: bytes at its end that are no character."""
        rest = self._decode(self._ids)[self._returned :]
        self._returned += len(rest)
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return decode_without_special_tokens(self._tokenizer, ids)

    def _drop_earlier_ids(self) -> None:
        """Keep the last tokens, from the beginning of a character on."""
        for length in range(_CONTEXT, min(_MAX_CONTEXT, len(self._ids))):
            kept = self._ids[-length:]
            if not self._decode(kept).startswith(REPLACEMENT):
                self._ids = kept
                return


def decode_without_special_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids; special tokens of a Hugging Face tokenizer are omitted."""
    fast = getattr(tokenizer, "tokenizer", None)
    if fast is not None:
        return str(fast.decode(list(ids), skip_special_tokens=True))
    return tokenizer.decode(ids)
