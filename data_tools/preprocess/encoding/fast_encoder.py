"""Fast encoding: a SentencePiece model that replaces an equivalent Hugging Face tokenizer.

SentencePiece encodes LLM-jp's vocabularies 8 to 15 times faster. The files do not state whether two
tokenizers are equivalent, so their ids are compared on text of the corpus first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.preprocess.encoding.sample import first_texts
from data_tools.preprocess.input.sources import InputSource
from data_tools.preprocess.selection.document_hooks import DocumentHooks
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer, load_tokenizer
from megatron_llmjp.tokenizers.base import Ids
from megatron_llmjp.tokenizers.hugging_face import HuggingFaceTokenizer

SAMPLE_BYTES = 2_000_000
PROBE_TEXTS = (
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
    """Tokenizer that encodes with a SentencePiece model, and otherwise acts as the original one.

    Texts that contain a special token are encoded by the original tokenizer, which recognizes it.
    """

    def __init__(self, original: HuggingFaceTokenizer, fast: Tokenizer) -> None:
        self.original, self.fast = original, fast
        special = original.tokenizer.get_added_tokens_decoder().values()
        self._special = re.compile("|".join(re.escape(token.content) for token in special) or "$.")
        self.kind, self.vocab_size = original.kind, original.vocab_size
        self.eod_id, self.eos_id = original.eod_id, original.eos_id
        self.bos_id, self.pad_id = original.bos_id, original.pad_id

    def encode(self, text: str) -> Ids:
        """Return the ids of a text."""
        return (self.original if self._special.search(text) else self.fast).encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text."""
        if any(map(self._special.search, texts)):
            return [self.encode(text) for text in texts]
        return self.fast.encode_batch(texts)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Decode with the original tokenizer."""
        return self.original.decode(ids)

    def files(self) -> dict[str, Path]:
        """Return the files of the original tokenizer."""
        return self.original.files()

    def identity(self) -> dict[str, Any]:
        """Return the identity of the original tokenizer, and of the model that encodes."""
        return self.original.identity() | {"encoded_by": self.fast.identity()}


def use_fast_encoder(
    original: Tokenizer,
    model: str,
    sources: list[InputSource],
    keys: list[str],
    hooks: DocumentHooks | None = None,
) -> tuple[Tokenizer, str]:
    """Return the tokenizer to use, and a message with the reason.

    Raises:
        UserError: the input is a pipe, which cannot be sampled, or the model is not readable.
    """
    if not isinstance(original, HuggingFaceTokenizer):
        raise UserError("--fast-encoder requires --tokenizer-type HuggingFaceTokenizer")
    if not sources[0].seekable:
        raise UserError("--fast-encoder: the tokenizers cannot be compared on the text of a pipe")
    fast = FastEncodingTokenizer(original, load_tokenizer("GPTSentencePieceTokenizer", model))
    texts = [*PROBE_TEXTS, *first_texts(sources, keys, SAMPLE_BYTES, hooks)]
    different = [
        text
        for text, ids in zip(texts, original.encode_batch(texts), strict=True)
        if fast.encode(text).tolist() != ids.tolist()
    ]
    if different:
        return original, (
            f"Not encoding with {model}: {len(different):,} of {len(texts):,} texts give different "
            f"ids, such as {different[0][:40]!r}. Using the slower Hugging Face tokenizer."
        )
    return fast, (
        f"Encoding with {model}, which gives the same ids as the Hugging Face tokenizer on "
        f"{len(texts):,} texts of the corpus."
    )
