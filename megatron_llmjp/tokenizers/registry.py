"""Tokenizer types: loading from flags or from a checkpoint, and tokenizer identities.

An identity is the result of ``Tokenizer.identity``, or its record in a dataset's manifest: the
type, the end-of-document id, and the contents of the files, independent of their paths and names.
A checkpoint stores a tokenizer's files under the names given by ``Tokenizer.files``.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from megatron_llmjp.config.tokenizer_types import TOKENIZER_TYPES
from megatron_llmjp.errors import UserError, did_you_mean
from megatron_llmjp.tokenizers.base import TikTokenSettings, Tokenizer
from megatron_llmjp.tokenizers.file_types import SENTENCEPIECE_HINT, first_character, suggest_type

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
"""Types that read a ``*.model``; the first is the default."""
GENERATION_FILE = "hf_generation.json"
"""File that ``convert_checkpoint`` stores next to a tokenizer, which is not part of it."""
_SENTENCEPIECE_FLAGS = f"--tokenizer-type {SENTENCEPIECE_HINT} --tokenizer-model"


Identity = Mapping[str, Any]


def identity_key(identity: Identity) -> Hashable:
    """Return a key that is equal for two tokenizers that give the same ids.

    The vocabulary size is included only for types without files, as it follows from the files.
    Settings are flags that a type requires in addition to its files (TikTokenizer).
    """
    sums = tuple(sorted(map(str, _files(identity).values())))
    size = None if sums else identity.get("vocab_size")
    settings = json.dumps(identity.get("settings"), sort_keys=True)
    return identity.get("type"), identity.get("eod_id"), size, sums, settings


def describe_identity(identity: Identity) -> str:
    """Describe the properties of a tokenizer that determine its ids, for messages."""
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


def stored_tokenizer_fields(folder: Path, kind: str | None = None) -> dict[str, str]:
    """Return the settings that load a checkpoint's tokenizer.

    Args:
        folder: the checkpoint's folder of tokenizer files, which need not exist.
        kind: the tokenizer's type; by default the first type that matches the files.

    Returns:
        ``tokenizer_type``, ``tokenizer_model`` and, for GPT2BPETokenizer, ``merge_file``; empty if
        the folder has no file of this type.
    """
    if kind in (None, "HuggingFaceTokenizer") and (folder / "tokenizer.json").is_file():
        return _fields("HuggingFaceTokenizer", folder)
    if kind in (None, "GPT2BPETokenizer"):
        vocabularies, merges = (
            _find_files(folder, "*vocab*.json"),
            _find_files(folder, "*merges*.txt"),
        )
        if vocabularies and merges:
            fields = _fields("GPT2BPETokenizer", vocabularies[0])
            return {**fields, "merge_file": str(merges[0])}
    if kind in (None, "TikTokenizer") and (folder / "tiktoken.json").is_file():
        return _fields("TikTokenizer", folder / "tiktoken.json")
    models = _find_files(folder, "*.model")
    if models and (kind is None or kind in SENTENCEPIECE_TYPES):
        return _fields(kind or SENTENCEPIECE_TYPES[0], models[0])
    files = [path for path in _find_files(folder, "*.json") if path.name != GENERATION_FILE]
    if kind == "HuggingFaceTokenizer" and len(files) == 1:
        return _fields(kind, files[0])  # stored under its own name, as earlier versions did
    return {}


def _fields(kind: str, path: Path) -> dict[str, str]:
    return {"tokenizer_type": kind, "tokenizer_model": str(path)}


def _find_files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


DEFAULT_TIKTOKEN = TikTokenSettings()


def load_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None,
    *,
    vocab_size: int | None = None,
    merge_file: str | Path | None = None,
    tiktoken: TikTokenSettings = DEFAULT_TIKTOKEN,
) -> Tokenizer:
    """Load the tokenizer given by Megatron-LM's flags of these names.

    Args:
        tokenizer_type: one of TOKENIZER_TYPES.
        tokenizer_model: a SentencePiece ``*.model``; for HuggingFaceTokenizer a tokenizer.json
            or its folder; for GPT2BPETokenizer the vocabulary as JSON, or a folder; for
            TikTokenizer a JSON list; not used by ByteLevelTokenizer and NullTokenizer.
        merge_file: for GPT2BPETokenizer; by default searched next to the vocabulary.
        vocab_size: for NullTokenizer, number of ids in its text; for TikTokenizer, number of ids
            including special tokens. Other types determine it from their files.
        tiktoken: further settings of TikTokenizer.

    Raises:
        UserError: the type is unknown, or a file is missing, damaged or of another type.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UserError(
            f"--tokenizer-type {tokenizer_type}: unknown type"
            f"{did_you_mean(tokenizer_type, TOKENIZER_TYPES)} "
            f"(possible: {', '.join(TOKENIZER_TYPES)})"
        )
    # Each library is imported only for its type, so that programs start quickly.
    if tokenizer_type == "ByteLevelTokenizer":
        from megatron_llmjp.tokenizers.byte_level import ByteLevelTokenizer

        return ByteLevelTokenizer()
    if tokenizer_type == "NullTokenizer":
        from megatron_llmjp.tokenizers.byte_level import NullTokenizer

        if vocab_size is None:
            raise UserError("--tokenizer-type NullTokenizer requires --vocab-size")
        return NullTokenizer(vocab_size)
    if not tokenizer_model:
        needed = "--tokenizer-model PATH"
        if tokenizer_type == "GPT2BPETokenizer":
            needed = "--vocab-file PATH and --merge-file PATH"
        raise UserError(f"--tokenizer-type {tokenizer_type} requires {needed}")
    if tokenizer_type == "GPT2BPETokenizer":
        from megatron_llmjp.tokenizers.gpt2 import GPT2BPETokenizer

        return GPT2BPETokenizer(Path(tokenizer_model), Path(merge_file) if merge_file else None)
    if tokenizer_type == "TikTokenizer":
        from megatron_llmjp.tokenizers.tiktoken import TikTokenizer

        return TikTokenizer(Path(tokenizer_model), tiktoken, vocab_size)
    _check_file_type(tokenizer_type, Path(tokenizer_model))
    if tokenizer_type == "HuggingFaceTokenizer":
        from megatron_llmjp.tokenizers.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(Path(tokenizer_model))
    from megatron_llmjp.tokenizers.sentencepiece import load_sentencepiece

    return load_sentencepiece(tokenizer_type, Path(tokenizer_model))


def _check_file_type(tokenizer_type: str, path: Path) -> None:
    """Check for a file of another type, for which the libraries give unclear errors.

    Raises:
        UserError: the file is of another type, which the message names.
    """
    if not path.exists():
        return
    given = f"--tokenizer-type {tokenizer_type} --tokenizer-model {path}"
    begins = "" if path.is_dir() else first_character(path)
    if tokenizer_type == "HuggingFaceTokenizer":
        expected = "a tokenizer.json"
        wrong = not (path / "tokenizer.json").is_file() if path.is_dir() else begins != "{"
        other = (
            ""
            if path.is_dir()
            else f"; a SentencePiece model is read with {_SENTENCEPIECE_FLAGS} {path}"
        )
    else:
        expected, other = "a SentencePiece model (*.model)", ""
        wrong = path.is_dir() or begins in ("{", "[")
    if wrong:
        found = "a folder" if path.is_dir() else "a file of another type"
        raise UserError(f"{given}: expected {expected}, found {found}{suggest_type(path) or other}")
