"""A SentencePiece model in place of the Hugging Face tokenizer that was made from it.

SentencePiece encodes LLM-jp's vocabularies 8 to 15 times faster. Nothing in the files says that
two tokenizers agree, so they are compared on text of the corpus itself before one stands in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.preprocess.sample import first_texts
from data_tools.preprocess.sources import InputSource
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer, load_tokenizer
from megatron_llmjp.tokenizers.base import Ids
from megatron_llmjp.tokenizers.hugging_face import HuggingFaceTokenizer

SAMPLE_BYTES = 2_000_000
PROBES = (
    "",
    " ",
    "\n",
    "  a\n\n\tb",
    "a<s>b</s>",
    "<EOD> <unk><pad>",
    "\0",
    "▁x",
    "\u3000",
    "a<0x0A>b",
)


class FastEncodingTokenizer(Tokenizer):
    """Ids by a SentencePiece model, everything else by the tokenizer it stands in for.

    Texts in which a special token is spelled out also stay with the original, which finds it.
    """

    def __init__(self, original: HuggingFaceTokenizer, twin: Tokenizer) -> None:
        self.original, self.twin = original, twin
        special = original.tokenizer.get_added_tokens_decoder().values()
        self._special = re.compile("|".join(re.escape(token.content) for token in special) or "$.")
        self.kind, self.vocab_size = original.kind, original.vocab_size
        self.eod_id, self.eos_id = original.eod_id, original.eos_id
        self.bos_id, self.pad_id = original.bos_id, original.pad_id

    def encode(self, text: str) -> Ids:
        """Return the twin's ids."""
        return (self.original if self._special.search(text) else self.twin).encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the twin's ids of each text."""
        if any(map(self._special.search, texts)):
            return [self.encode(text) for text in texts]
        return self.twin.encode_batch(texts)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the original's text."""
        return self.original.decode(ids)

    def files(self) -> dict[str, Path]:
        """Return the original's files."""
        return self.original.files()

    def identity(self) -> dict[str, Any]:
        """Return the original's identity, and by what its ids were made."""
        return self.original.identity() | {"encoded_by": self.twin.identity()}


def use_fast_encoder(
    original: Tokenizer, model: str, sources: list[InputSource], keys: list[str]
) -> tuple[Tokenizer, str]:
    """Return the tokenizer to use and a sentence on why.

    Raises:
        UserError: there is nothing to compare on, or the model cannot be read.
    """
    if not isinstance(original, HuggingFaceTokenizer):
        raise UserError("--sentencepiece-twin is for --tokenizer-type HuggingFaceTokenizer")
    if not sources[0].seekable:
        raise UserError("--sentencepiece-twin: tokenizers cannot be compared on a pipe's text")
    twin = FastEncodingTokenizer(original, load_tokenizer("GPTSentencePieceTokenizer", model))
    texts = [*PROBES, *first_texts(sources, keys, SAMPLE_BYTES)]
    different = [
        text
        for text, ids in zip(texts, original.encode_batch(texts), strict=True)
        if twin.encode(text).tolist() != ids.tolist()
    ]
    if different:
        return original, (
            f"Not encoding with {model}: {len(different):,} of {len(texts):,} texts give other "
            f"ids, such as {different[0][:40]!r}. The Hugging Face tokenizer is used, which is "
            "slower."
        )
    return twin, (
        f"Encoding with {model}: the same ids as the Hugging Face tokenizer on {len(texts):,} "
        "texts of the corpus."
    )
