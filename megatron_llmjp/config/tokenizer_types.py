"""Tokenizer types, as ``--tokenizer-type`` names them in all programs."""

from __future__ import annotations

TOKENIZER_TYPES = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "TikTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
)
TOKENIZER_TYPE_ALIASES = {"japanesesentencepiece": "GPTSentencePieceTokenizer"}
"""Megatron-DeepSpeed's names, in lower case: plain SentencePiece, end of document ``</s>``."""


def find_tokenizer_type(name: str) -> str | None:
    """Return the type of a name in any case, Megatron-DeepSpeed's included; None if unknown."""
    types = {known.lower(): known for known in TOKENIZER_TYPES} | TOKENIZER_TYPE_ALIASES
    return types.get(name.lower())
