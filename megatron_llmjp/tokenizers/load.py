"""From ``--tokenizer-type`` and ``--tokenizer-model`` to a tokenizer."""

from __future__ import annotations

from pathlib import Path

from megatron_llmjp.errors import UserError, suggest
from megatron_llmjp.tokenizers.base import Tokenizer
from megatron_llmjp.tokenizers.recognize import SENTENCE_PIECE, first_character, hint
from megatron_llmjp.tokenizers.settings import TikTokenSettings

DEFAULTS = TikTokenSettings()

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


def load_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None,
    *,
    vocab_size: int | None = None,
    merge_file: str | Path | None = None,
    tiktoken: TikTokenSettings = DEFAULTS,
) -> Tokenizer:
    """Return the tokenizer that Megatron-LM's flags of these names describe.

    Args:
        tokenizer_type: one of TOKENIZER_TYPES.
        tokenizer_model: a SentencePiece ``*.model``; for HuggingFaceTokenizer a tokenizer.json
            or its folder; for GPT2BPETokenizer the vocabulary as JSON, or a folder; for
            TikTokenizer a JSON list; not used by ByteLevelTokenizer and NullTokenizer.
        merge_file: of GPT2BPETokenizer; found near the vocabulary where it is None.
        vocab_size: ids that NullTokenizer's text may hold; number of ids that TikTokenizer takes
            from its file, special tokens included. The other types know their own.
        tiktoken: how TikTokenizer cuts texts, and its special tokens.

    Raises:
        UserError: an unknown type, or a file that is missing, broken or unfit for the type.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UserError(
            f"--tokenizer-type {tokenizer_type}: no such type"
            f"{suggest(tokenizer_type, TOKENIZER_TYPES)} (possible: {', '.join(TOKENIZER_TYPES)})"
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
        needed = "--tokenizer-model PATH"
        if tokenizer_type == "GPT2BPETokenizer":
            needed = "--vocab-file PATH and --merge-file PATH"
        raise UserError(f"--tokenizer-type {tokenizer_type} needs {needed}")
    if tokenizer_type == "GPT2BPETokenizer":
        from megatron_llmjp.tokenizers.gpt2 import GPT2BPETokenizer

        return GPT2BPETokenizer(Path(tokenizer_model), Path(merge_file) if merge_file else None)
    if tokenizer_type == "TikTokenizer":
        from megatron_llmjp.tokenizers.tik import TikTokenizer

        return TikTokenizer(Path(tokenizer_model), tiktoken, vocab_size)
    _check_kind(tokenizer_type, Path(tokenizer_model))
    if tokenizer_type == "HuggingFaceTokenizer":
        from megatron_llmjp.tokenizers.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(Path(tokenizer_model))
    from megatron_llmjp.tokenizers.spm import load_sentencepiece

    return load_sentencepiece(tokenizer_type, Path(tokenizer_model))


def _check_kind(tokenizer_type: str, path: Path) -> None:
    """Refuse a file of another type, whose content the libraries cannot explain.

    Raises:
        UserError: naming the type that reads it.
    """
    if not path.exists():
        return
    given = f"--tokenizer-type {tokenizer_type} --tokenizer-model {path}"
    begins = "" if path.is_dir() else first_character(path)
    if tokenizer_type == "HuggingFaceTokenizer":
        expected = "a tokenizer.json"
        wrong = not (path / "tokenizer.json").is_file() if path.is_dir() else begins != "{"
        other = "" if path.is_dir() else f"; a SentencePiece model is read with {_MODEL} {path}"
    else:
        expected, other = "a SentencePiece model (*.model)", ""
        wrong = path.is_dir() or begins in ("{", "[")
    if wrong:
        found = "a folder" if path.is_dir() else "a file of another kind"
        raise UserError(f"{given}: expected {expected}, found {found}{hint(path) or other}")


_MODEL = f"--tokenizer-type {SENTENCE_PIECE} --tokenizer-model"
