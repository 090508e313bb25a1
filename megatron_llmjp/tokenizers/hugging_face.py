"""Hugging Face fast tokenizers: a tokenizer.json, or a folder that holds one.

Read with the ``tokenizers`` library alone, since importing transformers costs seconds. The
template of the tokenizer.json (which may add BOS or EOS) is not applied, as in megatron-core
0.16, unless ``include_special_tokens`` is called: ``--append-eod`` is what ends a document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megatron_llmjp.errors import UserError, download_hint
from megatron_llmjp.tokenizers.base import Ids
from megatron_llmjp.tokenizers.fast import FastTokenizer
from megatron_llmjp.tokenizers.hf_special_tokens import PROBES, Added, find_added
from megatron_llmjp.tokenizers.recognize import hint

COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
WITH_PREFIX_SPACE = ("GPT2", "Roberta", "Bart")
"""Classes of transformers whose ``add_prefix_space`` stands over the tokenizer.json's."""
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Where no tokenizer_config.json names the eos token: the first of these in the vocabulary.
LIKELY_EOD = ("<EOD>", "<EOD|LLM-jp>", "<|eod|>", "<|endoftext|>", "</s>", "<eos>")


class HuggingFaceTokenizer(FastTokenizer):
    """A fast tokenizer; end of document is its ``eos_token``, or a token named like ``<EOD>``."""

    kind = "HuggingFaceTokenizer"

    def __init__(self, path: Path) -> None:
        self.path, self.added = path, Added([], [])
        self.json_file = path / "tokenizer.json" if path.is_dir() else path
        settings = _settings(self.json_file.parent)
        self.tokenizer = _load(path, self.json_file)
        _apply(settings, self.tokenizer)
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1  # not their number: there may be gaps
        self.bos_id = self._id_of(settings.get("bos_token"))
        self.pad_id = self._id_of(settings.get("pad_token"))
        self.eos_id = self._id_of(settings.get("eos_token"))
        likely = (self._id_of(name) for name in LIKELY_EOD)
        eod = self.eos_id if self.eos_id is not None else next(filter(_known, likely), None)
        if eod is None:
            raise UserError(
                f"{self.json_file}: no end-of-document token. Expected an eos_token in "
                f"tokenizer_config.json beside it, or one of {', '.join(LIKELY_EOD)} in its "
                "vocabulary."
            )
        self.eod_id = eod

    def include_special_tokens(self) -> None:
        """Encode texts with the special tokens that transformers adds, from here on.

        Raises:
            UserError: transformers cannot read the tokenizer, or encodes texts in another way.
        """
        plain = [super(HuggingFaceTokenizer, self).encode(text).tolist() for text in PROBES]
        self.added = find_added(self.path, plain)

    def encode(self, text: str) -> Ids:
        """Return the ids of one text."""
        return self._with_added(super().encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text."""
        return [self._with_added(ids) for ids in super().encode_batch(texts)]

    def _with_added(self, ids: Ids) -> Ids:
        if not self.added.before and not self.added.after:
            return ids
        return np.array([*self.added.before, *ids.tolist(), *self.added.after], np.int32)

    def _id_of(self, token: Any) -> int | None:
        """Return the id of a token as the configuration spells it: a string, or a mapping."""
        name = token.get("content") if isinstance(token, dict) else token
        return self.tokenizer.token_to_id(name) if isinstance(name, str) else None

    def files(self) -> dict[str, Path]:
        """Return tokenizer.json, whatever its name, and what transformers reads next to it."""
        companions = {name: self.json_file.parent / name for name in COMPANIONS}
        found = {name: path for name, path in companions.items() if path.is_file()}
        return {"tokenizer.json": self.json_file} | found

    def identifying_files(self) -> list[Path]:
        """Return the file that decides the ids."""
        return [self.json_file]


def _known(token_id: int | None) -> bool:
    return token_id is not None


def _settings(folder: Path) -> dict[str, Any]:
    """Return the special tokens that the folder's configuration names."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                settings.update(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise UserError(
                    f"{path}: not valid JSON ({error}). Copy the file again."
                ) from error
    return settings


def _apply(settings: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> None:
    """Change a tokenizer as transformers' AutoTokenizer does before it encodes.

    Truncation and padding belong to a call there, not to the tokenizer. Tokens that only the
    configuration names are added.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    split = tokenizer.pre_tokenizer
    named = str(settings.get("tokenizer_class") or "").startswith(WITH_PREFIX_SPACE)
    if named and isinstance(split, tokenizers.pre_tokenizers.ByteLevel):
        split.add_prefix_space = bool(settings.get("add_prefix_space", False))
        tokenizer.pre_tokenizer = split
    declared = settings.get("added_tokens_decoder") or {}
    known = tokenizer.get_vocab(with_added_tokens=True)
    extra = [settings.get(f"{role}_token") for role in ROLES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = settings.get(name) or []
        extra += tokens.values() if isinstance(tokens, dict) else tokens
    added = [_added(token) for _, token in sorted(declared.items(), key=lambda pair: int(pair[0]))]
    added += [_added(token, special=True) for token in extra if token]
    tokenizer.add_tokens([token for token in added if token.content not in known])


def _added(token: Any, special: bool = False) -> tokenizers.AddedToken:
    """Return a token as the configuration spells it: a string, or a mapping."""
    if not isinstance(token, dict):
        return tokenizers.AddedToken(str(token), special=special)
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    given = {name: bool(token[name]) for name in flags if name in token}
    return tokenizers.AddedToken(token["content"], **({"special": special} | given))


def _load(given: Path, json_file: Path) -> tokenizers.Tokenizer:
    if not json_file.is_file():
        missing = f"does not exist{download_hint(given)}"
        what = missing if not given.exists() else "holds no tokenizer.json"
        raise UserError(
            f"--tokenizer-model {given}: {what}. Expected a tokenizer.json or a folder with one "
            "(a fast tokenizer; for a SentencePiece *.model use SentencePieceTokenizer)."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(json_file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{json_file}: not a readable tokenizer.json ({error})"
            + (
                hint(json_file, "HuggingFaceTokenizer")
                or ". Copy the file again, or save it with the version of the tokenizers library "
                "that is installed here"
            )
        ) from error
