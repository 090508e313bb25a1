"""The tokenizer that a checkpoint stores: which of its files is read as which type.

``Tokenizer.files`` gives the names under which a checkpoint stores them.
"""

from __future__ import annotations

from pathlib import Path

SENTENCE_PIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
"""Types that read a ``*.model``; the first where nothing says which."""

GENERATION = "hf_generation.json"
"""What ``convert_checkpoint`` stores next to a tokenizer, and is none itself."""


def stored_tokenizer(folder: Path, kind: str | None = None) -> dict[str, str]:
    """Return the settings that read a checkpoint's tokenizer.

    Args:
        folder: the checkpoint's folder of tokenizer files, which may be missing.
        kind: the tokenizer's type, where the configuration names it; else the first that fits.

    Returns:
        ``tokenizer_type``, ``tokenizer_model`` and, for GPT2BPETokenizer, ``merge_file``; nothing
        where the folder holds no file of this type.
    """
    if kind in (None, "HuggingFaceTokenizer") and (folder / "tokenizer.json").is_file():
        return _fields("HuggingFaceTokenizer", folder)
    if kind in (None, "GPT2BPETokenizer"):
        vocabularies, merges = _found(folder, "*vocab*.json"), _found(folder, "*merges*.txt")
        if vocabularies and merges:
            fields = _fields("GPT2BPETokenizer", vocabularies[0])
            return {**fields, "merge_file": str(merges[0])}
    if kind in (None, "TikTokenizer") and (folder / "tiktoken.json").is_file():
        return _fields("TikTokenizer", folder / "tiktoken.json")
    models = _found(folder, "*.model")
    if models and (kind is None or kind in SENTENCE_PIECE):
        return _fields(kind or SENTENCE_PIECE[0], models[0])
    files = [path for path in _found(folder, "*.json") if path.name != GENERATION]
    if kind == "HuggingFaceTokenizer" and len(files) == 1:
        return _fields(kind, files[0])  # stored under its own name, as earlier versions did
    return {}


def _fields(kind: str, path: Path) -> dict[str, str]:
    return {"tokenizer_type": kind, "tokenizer_model": str(path)}


def _found(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))
