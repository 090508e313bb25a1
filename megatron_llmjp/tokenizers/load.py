"""From ``--tokenizer-type`` and ``--tokenizer-model`` to a tokenizer."""

from __future__ import annotations

from pathlib import Path

from megatron_llmjp.errors import UserError, suggest
from megatron_llmjp.tokenizers.base import Tokenizer

TOKENIZER_TYPES = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
)


def load_tokenizer(
    tokenizer_type: str, tokenizer_model: str | Path | None, *, vocab_size: int | None = None
) -> Tokenizer:
    """Return the tokenizer that Megatron-LM's flags of these names describe.

    Args:
        tokenizer_type: one of TOKENIZER_TYPES.
        tokenizer_model: a SentencePiece ``*.model``; for HuggingFaceTokenizer a tokenizer.json
            or its folder; not used by ByteLevelTokenizer and NullTokenizer.
        vocab_size: ids that NullTokenizer's text may hold; the other types know their own.

    Raises:
        UserError: an unknown type, or a file that is missing, broken or unfit for the type.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UserError(
            f"--tokenizer-type {tokenizer_type}: no such type"
            f"{suggest(tokenizer_type, TOKENIZER_TYPES)} Possible: {', '.join(TOKENIZER_TYPES)}."
        )
    # Each library is imported only when its type is asked for: programs must start at once.
    if tokenizer_type == "ByteLevelTokenizer":
        from megatron_llmjp.tokenizers.plain import ByteLevelTokenizer

        return ByteLevelTokenizer()
    if tokenizer_type == "NullTokenizer":
        from megatron_llmjp.tokenizers.plain import NullTokenizer

        if vocab_size is None:
            raise UserError("--tokenizer-type NullTokenizer needs --vocab-size")
        return NullTokenizer(vocab_size)
    if not tokenizer_model:
        raise UserError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model PATH")
    if tokenizer_type == "HuggingFaceTokenizer":
        from megatron_llmjp.tokenizers.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(Path(tokenizer_model))
    from megatron_llmjp.tokenizers import spm

    model_class: type[spm.SentencePieceModel] = {
        "SentencePieceTokenizer": spm.SentencePieceTokenizer,
        "GPTSentencePieceTokenizer": spm.SentencePieceModel,
        "Llama2Tokenizer": spm.Llama2Tokenizer,
    }[tokenizer_type]
    return model_class(Path(tokenizer_model))
