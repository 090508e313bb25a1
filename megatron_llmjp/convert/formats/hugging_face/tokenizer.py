"""The files of a tokenizer in a folder; they travel with a model byte for byte."""

from __future__ import annotations

from pathlib import Path

from megatron_llmjp.errors import UserError

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tiktoken.json",
    "chat_template.jinja",
    "chat_template.json",
)
PATTERNS = ("*.model", "*vocab*.json", "*merges*.txt")
"""SentencePiece models, and both files of GPT2BPETokenizer, under names of their own."""


def tokenizer_files(folder: Path | None) -> dict[str, Path]:
    """Return the tokenizer files of a folder by name, in order of their names.

    Args:
        folder: of the tokenizer, or a single file.

    Raises:
        UserError: nothing of this name is there.
    """
    if folder is None:
        return {}
    if folder.is_file():
        return {folder.name: folder}
    if not folder.is_dir():
        raise UserError(f"{folder}: no tokenizer is there; give a folder or a file")
    paths = [path for pattern in PATTERNS for path in folder.glob(pattern)]
    paths += [folder / name for name in NAMES]
    return {path.name: path for path in sorted(set(paths)) if path.is_file()}
