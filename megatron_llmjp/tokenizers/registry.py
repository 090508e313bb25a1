"""Comparing tokenizers by what decides their ids: type, end of document and contents of files.

Where a file is stored and what it is called does not matter. An identity is what
``Tokenizer.identity`` returns, or what a dataset's manifest has recorded of it.

From ``--tokenizer-type`` and ``--tokenizer-model`` to a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from megatron_llmjp.errors import UserError, did_you_mean
from megatron_llmjp.tokenizers.base import Tokenizer
from megatron_llmjp.tokenizers.settings import TikTokenSettings

Identity = Mapping[str, Any]


def key_of(identity: Identity) -> Hashable:
    """Equal for two tokenizers that give the same ids.

    The vocabulary's size follows from the files; it counts for types that have none. Settings are
    those of flags that a type needs next to its files (TikTokenizer).
    """
    sums = tuple(sorted(map(str, _files(identity).values())))
    size = None if sums else identity.get("vocab_size")
    settings = json.dumps(identity.get("settings"), sort_keys=True)
    return identity.get("type"), identity.get("eod_id"), size, sums, settings


def describe(identity: Identity) -> str:
    """A tokenizer in words: what decides its ids."""
    sums = sorted(str(digest)[:12] for digest in _files(identity).values())
    known = [f"{identity.get('vocab_size')} ids", f"EOD {identity.get('eod_id')}"]
    settings = identity.get("settings")
    if isinstance(settings, Mapping):
        known.append(f"pattern {settings.get('pattern')}")
        known.append(f"special tokens {settings.get('num_special_tokens')}")
    return f"{identity.get('type')} ({', '.join([*known, *sums])})"


def _files(identity: Identity) -> dict[str, Any]:
    files = identity.get("files")
    return dict(files) if isinstance(files, Mapping) else {}


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
            f"{did_you_mean(tokenizer_type, TOKENIZER_TYPES)} "
            f"Possible: {', '.join(TOKENIZER_TYPES)}."
        )
    # Each library is imported only when its type is asked for: programs must start at once.
    if tokenizer_type == "ByteLevelTokenizer":
        from megatron_llmjp.tokenizers.byte_level import ByteLevelTokenizer

        return ByteLevelTokenizer()
    if tokenizer_type == "NullTokenizer":
        from megatron_llmjp.tokenizers.byte_level import NullTokenizer

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
    from megatron_llmjp.tokenizers.sentencepiece import load_sentencepiece

    return load_sentencepiece(tokenizer_type, Path(tokenizer_model))


def _check_kind(tokenizer_type: str, path: Path) -> None:
    """Refuse a file of the other kind, whose content neither library can explain.

    Raises:
        UserError: a SentencePiece model for HuggingFaceTokenizer, or a tokenizer.json or a folder
            for one of the SentencePiece types.
    """
    given = f"--tokenizer-type {tokenizer_type} --tokenizer-model {path}"
    if tokenizer_type == "HuggingFaceTokenizer":
        models = [path] if path.is_file() and not _is_json(path) else []
        if path.is_dir() and not (path / "tokenizer.json").is_file():
            models = sorted(path.glob("*.model"))
        if models:
            raise UserError(
                f"{given}: {models[0].name} is no tokenizer.json. A SentencePiece model is read "
                f"with --tokenizer-type {_SENTENCE_PIECE} --tokenizer-model {models[0]}"
            )
        return
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        if (path / "tokenizer.json").is_file():
            raise UserError(f"{given}: a Hugging Face folder is read with {_hugging_face(path)}")
        hint = f"give {models[0]}" if models else "give the *.model file"
        raise UserError(f"{given}: expected a SentencePiece model, found a folder: {hint}")
    if path.is_file() and _is_json(path):
        raise UserError(f"{given}: a tokenizer.json is read with {_hugging_face(path)}")


_SENTENCE_PIECE = "SentencePieceTokenizer (or Llama2Tokenizer, GPTSentencePieceTokenizer)"


def _hugging_face(path: Path) -> str:
    return f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {path}"


def _is_json(path: Path) -> bool:
    """Whether a file begins as JSON does; a SentencePiece model is binary."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
