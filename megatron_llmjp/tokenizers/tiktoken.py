"""Byte-level BPE with the tiktoken library, compatible with Megatron-LM's TikTokenizer.

Source of the behaviour: Megatron-LM megatron/training/tokenizer (core 0.12), CustomTikTokenizer.
A special token within a text is encoded as text; megatron-core's own class (0.16) recognizes it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.base import Ids, TikTokenSettings, Tokenizer, panics_as_errors
from megatron_llmjp.tokenizers.file_types import suggest_type

PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}
"""Regular expressions that split a text before merging, by their names in Megatron-LM."""
REQUIRED_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
DEFAULT_MAX_VOCAB_SIZE = 2**17
"""Megatron-LM's default of ``--vocab-size``, including special tokens."""
MAX_CONSECUTIVE_SPACES, SPACES = 999_000, re.compile(r"\s+")
_KEYS = {"rank", "token_bytes", "token_str"}
_EXPECTED = "Expected Megatron-LM's JSON list of {rank, token_bytes, token_str}"


class TikTokenizer(Tokenizer):
    """Vocabulary of byte sequences by rank, after a block of special tokens."""

    kind = "TikTokenizer"

    def __init__(
        self, vocab_file: Path, settings: TikTokenSettings, vocab_size: int | None = None
    ) -> None:
        """Read a vocabulary.

        Args:
            vocab_file: a JSON list of ``{"rank", "token_bytes" (base64), "token_str"}``.
            settings: pattern and special tokens.
            vocab_size: number of ids, including special tokens; further tokens of the vocabulary
                are omitted. By default at most DEFAULT_MAX_VOCAB_SIZE.

        Raises:
            UserError: the file or a setting is invalid.
        """
        self.vocab_file, self.settings = vocab_file, settings
        names = _special_names(settings)
        tokens = _read_vocabulary(vocab_file)
        self.vocab_size = vocab_size or min(DEFAULT_MAX_VOCAB_SIZE, len(tokens) + len(names))
        _check_size(vocab_file, len(tokens), len(names), self.vocab_size)
        tokens = tokens[: self.vocab_size - len(names)]
        self.special_names, self.tokens = tuple(names), tuple(tokens)
        self._encoding = _build_encoding(
            vocab_file,
            PATTERNS[settings.pattern],
            {token: rank for rank, token in enumerate(tokens, len(names))},
            {name: token_id for token_id, name in enumerate(names)},
        )
        self.bos_id = names.index("<s>")
        self.eod_id = self.eos_id = names.index("</s>")
        self.pad_id = names.index("<pad>") if "<pad>" in names else None

    def encode(self, text: str) -> Ids:
        """Return the ids of one text.

        Raises:
            ValueError: the text has a lone surrogate (tiktoken would write U+FFFD), or a million
                consecutive spaces, on which tiktoken's regular expressions run out of memory.
        """
        text.encode()
        if _longest_run_of_spaces(text) > MAX_CONSECUTIVE_SPACES:
            raise ValueError(
                f"more than {MAX_CONSECUTIVE_SPACES:,} consecutive spaces: tiktoken cannot split it"
            )
        try:
            with panics_as_errors():
                return np.array(self._encoding.encode_ordinary(text), np.int32)
        except ValueError as error:
            raise ValueError(f"tiktoken cannot split the text: {error}") from error

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text, including special tokens; invalid UTF-8 becomes U+FFFD."""
        return str(self._encoding.decode([int(i) for i in ids]))

    def files(self) -> dict[str, Path]:
        """Return the vocabulary file."""
        return {"tiktoken.json": self.vocab_file}

    def identity(self) -> dict[str, Any]:
        """Return the identity of this tokenizer: its vocabulary and its settings."""
        settings = {
            "pattern": self.settings.pattern,
            "num_special_tokens": self.settings.num_special_tokens,
            "special_tokens": list(self.settings.special_tokens or REQUIRED_SPECIAL_TOKENS),
            "vocab_size": self.vocab_size,
        }
        return super().identity() | {"settings": settings}


def _longest_run_of_spaces(text: str) -> int:
    """Return the length of the longest run of whitespace; 0 for texts too short to matter."""
    if len(text) <= MAX_CONSECUTIVE_SPACES:
        return 0
    return max(map(len, SPACES.findall(text)), default=0)


def _special_names(settings: TikTokenSettings) -> list[str]:
    """Return the names of all special tokens by id.

    Raises:
        UserError: the pattern is unknown, or names are missing, duplicate or too many.
    """
    names, number = (
        list(settings.special_tokens or REQUIRED_SPECIAL_TOKENS),
        settings.num_special_tokens,
    )
    if settings.pattern not in PATTERNS:
        raise UserError(f"--tiktoken-pattern {settings.pattern}: expected v1 or v2")
    given = f"--tiktoken-special-tokens {' '.join(names)}"
    if missing := [name for name in REQUIRED_SPECIAL_TOKENS if name not in names]:
        raise UserError(f"{given}: {' '.join(missing)} must be included")
    if len(names) > number:
        raise UserError(
            f"--tiktoken-num-special-tokens {number}: {len(names)} are given: {' '.join(names)}"
        )
    names += [f"<SPECIAL_{token_id}>" for token_id in range(len(names), number)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{given}: {' '.join(sorted(twice))} is given twice")
    return names


def _read_vocabulary(path: Path) -> list[bytes]:
    """Return the tokens by rank.

    Raises:
        UserError: the file is missing, damaged or of another type; the message names the entry.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"--tokenizer-model {path}: {what}. {_EXPECTED}.")
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--tokenizer-model {path}: not a readable TikTokenizer vocabulary ({error}). "
            f"{_EXPECTED}. A plain .tiktoken file does not specify its special tokens and "
            "pattern: use the tokenizer.json of the same tokenizer (HuggingFaceTokenizer)"
        ) from error
    if not isinstance(entries, list):
        raise UserError(f"--tokenizer-model {path}: not a list. {_EXPECTED}{suggest_type(path)}")
    tokens = [_parse_entry(path, rank, entry) for rank, entry in enumerate(entries)]
    ranks: dict[bytes, int] = {}
    for rank, token in enumerate(tokens):
        if (first := ranks.setdefault(token, rank)) != rank:
            raise UserError(f"{path}: entry {rank} has the same bytes as entry {first}")
    return tokens


def _parse_entry(path: Path, rank: int, entry: Any) -> bytes:
    """Return the bytes of one entry."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise UserError(f"{path}: entry {rank} is {str(entry)[:80]}. {_EXPECTED}.")
    if entry["rank"] != rank:
        raise UserError(
            f"{path}: entry {rank} has rank {str(entry['rank'])[:40]}; entries"
            " must be sorted by rank"
        )
    try:
        token = base64.b64decode(entry["token_bytes"], validate=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: entry {rank}: token_bytes is not base64 ({error})") from error
    if rank < 256 and token != bytes([rank]):
        raise UserError(
            f"{path}: entry {rank} is {token[:40]!r}; the first 256"
            " entries must be the bytes 0 to 255"
        )
    return token


def _check_size(path: Path, tokens: int, special: int, vocab_size: int) -> None:
    """Check the vocabulary size against the number of tokens in the file.

    Raises:
        UserError: the size is too large or too small.
    """
    if tokens + special < vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: {path} has {tokens} tokens, with {special} special tokens "
            f"(--tiktoken-num-special-tokens) {tokens + special}. Remove --vocab-size to use all, "
            "or give that number"
        )
    if vocab_size < special + 256:
        raise UserError(
            f"{path}: {special} special tokens (--tiktoken-num-special-tokens) and 256 bytes "
            f"exceed a vocabulary of {vocab_size}"
        )


def _build_encoding(
    path: Path, pattern: str, ranks: dict[bytes, int], special: dict[str, int]
) -> Any:
    """Return the tiktoken library's Encoding."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(
            "--tokenizer-type TikTokenizer requires the tiktoken package: pip install tiktoken"
        ) from error
    return tiktoken.Encoding(
        path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
