"""Tokenizer types by the contents of files, for messages about files of another type."""

from __future__ import annotations

import json
from pathlib import Path

SENTENCEPIECE_HINT = "SentencePieceTokenizer (or Llama2Tokenizer, GPTSentencePieceTokenizer)"


def suggest_type(path: Path, given_type: str = "") -> str:
    """Return ``; it is read with --tokenizer-type ...``, or "" if no other type reads the path.

    Args:
        path: an existing file or folder.
        given_type: the type that cannot read it.
    """
    kind, model = _folder_type(path) if path.is_dir() else (_file_type(path), path)
    if kind is None or kind == given_type:
        return ""
    flag = "--vocab-file" if kind == "GPT2BPETokenizer" else "--tokenizer-model"
    return f"; it is read with --tokenizer-type {kind} {flag} {model}"


def first_character(path: Path) -> str:
    """Return the first non-space character of a file: JSON starts with ``{`` or ``[``."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1].decode(errors="replace")


def _folder_type(folder: Path) -> tuple[str | None, Path]:
    """Return the type that reads a folder, and the path to pass to it."""
    if (folder / "tokenizer.json").is_file():
        return "HuggingFaceTokenizer", folder
    if models := sorted(folder.glob("*.model")):
        return SENTENCEPIECE_HINT, models[0]
    has_both = any(folder.glob("*vocab*.json")) and any(folder.glob("*merges*.txt"))
    return ("GPT2BPETokenizer" if has_both else None), folder


def _file_type(path: Path) -> str | None:
    if first_character(path) not in ("{", "["):
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if isinstance(content, list):
        is_token = bool(content) and isinstance(content[0], dict) and "token_bytes" in content[0]
        return "TikTokenizer" if is_token else None
    if isinstance(content.get("model"), dict):
        return "HuggingFaceTokenizer"
    return "GPT2BPETokenizer" if all(isinstance(i, int) for i in content.values()) else None
