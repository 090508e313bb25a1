"""GPT-2's byte-level BPE, compatible with Megatron-LM's GPT2BPETokenizer.

Source of the behaviour: Megatron-LM megatron/training/tokenizer (core 0.12), _GPT2BPETokenizer.
``<|endoftext|>`` ends a document; within a text it is encoded as text. Newer versions of
Megatron-LM (from core 0.15) read the files with transformers, which recognizes it in a text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import tokenizers

from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.base import panics_as_errors
from megatron_llmjp.tokenizers.file_types import suggest_type
from megatron_llmjp.tokenizers.hugging_face import FastTokenizer

EOD = "<|endoftext|>"
UNMERGED_TOKENS = re.compile(r"<.*>|\[.*\]|madeupword\d+", re.DOTALL)
"""Tokens that no merge produces: special tokens, and padding of the vocabulary."""


class GPT2BPETokenizer(FastTokenizer):
    """Byte-level BPE that does not recognize special tokens in the text."""

    kind = "GPT2BPETokenizer"

    def __init__(self, vocab_file: Path, merge_file: Path | None = None) -> None:
        self.vocab_file, self.merge_file = _find_files(vocab_file, merge_file)
        _check_vocabulary(self.vocab_file)
        try:
            with panics_as_errors():
                model = tokenizers.models.BPE.from_file(str(self.vocab_file), str(self.merge_file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{self.vocab_file} and {self.merge_file}: expected a JSON vocabulary and its "
                f"merges ({str(error)[:300]}). Copy both files again."
            ) from error
        self.tokenizer = tokenizers.Tokenizer(model)
        self.tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = tokenizers.decoders.ByteLevel()
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        self.eod_id = self.eos_id = self.bos_id = self.tokenizer.get_vocab()[EOD]
        _check_merges(self.vocab_file, self.merge_file, self.tokenizer)

    def files(self) -> dict[str, Path]:
        """Return the vocabulary and the merges, under the names that transformers expects."""
        return {"vocab.json": self.vocab_file, "merges.txt": self.merge_file}


def _check_vocabulary(path: Path) -> None:
    """Check for a vocabulary that loses text: the library silently drops bytes without a token.

    Raises:
        UserError: the file is damaged or of another type, has a duplicate id, or lacks a byte.
    """
    try:
        vocabulary = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--vocab-file {path}: invalid JSON ({error}). Copy the file again"
        ) from error
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if not ids or not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise UserError(
            f"--vocab-file {path}: expected a JSON object of tokens and ids"
            f"{suggest_type(path, 'GPT2BPETokenizer')}"
        )
    if len(set(ids)) != len(ids):
        twice = next(token_id for token_id, count in Counter(ids).items() if count > 1)
        raise UserError(f"--vocab-file {path}: several tokens have id {twice}")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if missing := [character for character in alphabet if character not in vocabulary]:
        raise UserError(
            f"--vocab-file {path}: not a byte-level vocabulary: {len(missing)} of the 256 bytes "
            f"have no token, such as {min(missing)!r}"
        )
    if EOD not in vocabulary:
        raise UserError(f"--vocab-file {path}: no {EOD} token, which ends a document")


def _check_merges(vocab: Path, merges: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Check that the merges produce the whole vocabulary; those of a truncated file do not.

    Raises:
        UserError: a token is not produced; the message names it.
    """
    lines = merges.read_text(encoding="utf-8").split("\n")
    produced = {
        line.rstrip("\r").replace(" ", "") for line in lines if not line.startswith("#version")
    }
    lacking = [
        token
        for token in tokenizer.get_vocab()
        if len(token) > 1 and token not in produced and not UNMERGED_TOKENS.fullmatch(token)
    ]
    if lacking:
        raise UserError(
            f"--merge-file {merges}: its {len(produced):,} merges do not produce "
            f"{len(lacking):,} tokens of {vocab}, such as {min(lacking)!r}: the file is truncated, "
            "or belongs to another vocabulary"
        )


def _find_files(vocab: Path, merges: Path | None) -> tuple[Path, Path]:
    """Return both files; in a folder, or next to the vocabulary, they are found by name."""
    if vocab.is_dir():
        found = sorted(vocab.glob("*vocab*.json"))
        vocab = found[0] if found else vocab / "vocab.json"
    if merges is None:
        named = vocab.with_name(vocab.name.replace("vocab", "merges")).with_suffix(".txt")
        merges = next(
            filter(Path.is_file, [named, *sorted(vocab.parent.glob("*merges*.txt"))]), named
        )
    for path, flag in ((vocab, "--vocab-file"), (merges, "--merge-file")):
        if not path.is_file():
            raise UserError(
                f"{flag} {path}: no such file. GPT2BPETokenizer requires a JSON vocabulary and its "
                "merges, such as gpt2-vocab.json and gpt2-merges.txt"
            )
    return vocab, merges
