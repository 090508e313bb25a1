"""Tokenizer files travel with a model, byte for byte: re-serializing them loses metadata."""

from __future__ import annotations

import shutil
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
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_files(folder: Path | None) -> list[Path]:
    """The tokenizer files of a folder: those of known names, and SentencePiece models."""
    if folder is None:
        return []
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: no tokenizer is there; give a folder or a file")
    names = {path.name: path for path in folder.glob("*.model")}
    names |= {name: folder / name for name in NAMES if (folder / name).is_file()}
    return [names[name] for name in sorted(names)]


def special_token_ids(folder: Path | None, vocabulary: int) -> dict[str, int]:
    """``bos_token_id``, ``eos_token_id``, ``pad_token_id`` of a tokenizer, as far as it has them.

    Args:
        folder: the tokenizer's, if there is one.
        vocabulary: rows of the model's embedding.

    Raises:
        UserError: its files are damaged, or it has more tokens than the model.
    """
    files = {path.name: path for path in tokenizer_files(folder)}
    models = [path for name, path in files.items() if name.endswith(".model")]
    if "tokenizer.json" in files:
        from megatron_llmjp.tokenizers import load_tokenizer

        tokenizer = load_tokenizer("HuggingFaceTokenizer", files["tokenizer.json"])
    elif models:
        from megatron_llmjp.tokenizers import load_tokenizer

        tokenizer = load_tokenizer("GPTSentencePieceTokenizer", models[0])
    else:
        return {}
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{folder}: a tokenizer of {tokenizer.vocab_size} tokens, the model has {vocabulary}: "
            "it belongs to another model"
        )
    eos = tokenizer.eod_id if tokenizer.eos_id is None else tokenizer.eos_id
    ids = {"bos": tokenizer.bos_id, "eos": eos, "pad": tokenizer.pad_id}
    return {f"{name}_token_id": value for name, value in ids.items() if value is not None}


def copy_tokenizer(folder: Path | None, target: Path) -> None:
    """Copy a tokenizer's files."""
    for path in tokenizer_files(folder):
        shutil.copyfile(path, target / path.name)
