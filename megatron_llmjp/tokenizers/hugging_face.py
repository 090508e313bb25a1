"""Hugging Face fast tokenizers, with the special tokens that transformers adds.

Encoding with the ``tokenizers`` library, for every type that is built on it.

The special tokens that transformers adds around a text.

They follow from the tokenizer.json's template, from ``add_bos_token`` and ``add_eos_token`` of its
configuration and from the tokenizer's class, differently from release to release. So transformers
itself encodes a few texts, which takes seconds.

Hugging Face fast tokenizers: a tokenizer.json, or a folder that holds one.

Read with the ``tokenizers`` library alone, since importing transformers costs seconds. The
template of the tokenizer.json (which may add BOS or EOS) is not applied, as in megatron-core
0.16, unless ``include_special_tokens`` is called: ``--append-eod`` is what ends a document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from megatron_llmjp.errors import UserError, download_hint
from megatron_llmjp.tokenizers.base import Ids, Tokenizer
from megatron_llmjp.tokenizers.registry import suggest_type


class FastTokenizer(Tokenizer):
    """A tokenizer of the library, to which no special tokens are added.

    Attributes:
        tokenizer: the library's object.
    """

    tokenizer: tokenizers.Tokenizer

    def encode(self, text: str) -> Ids:
        """Return the ids of one text, without what the tokenizer's template would add."""
        _refuse_surrogates(text)
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, encoded together."""
        for text in texts:
            _refuse_surrogates(text)
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text, special tokens included."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def piece(self, token_id: int) -> str:
        """Return the token of one id, as it stands in the vocabulary."""
        return str(self.tokenizer.id_to_token(int(token_id)))


def _refuse_surrogates(text: str) -> None:
    text.encode()  # the library's own error for a lone surrogate is a bare TypeError


PROBES = ("a", "Hello world.\n 1,234", "吾輩は猫である。")


class AddedTokens(NamedTuple):
    """Ids before and after each text."""

    before: list[int]
    after: list[int]


def find_added_tokens(path: Path, plain: list[list[int]]) -> AddedTokens:
    """Return what ``AutoTokenizer`` adds to a text.

    Args:
        path: a tokenizer.json, or a folder that transformers reads.
        plain: this program's ids of PROBES, without added tokens.

    Raises:
        UserError: transformers cannot read the tokenizer, or gives other ids of the text itself.
    """
    theirs = _load_with_transformers(path)
    found = {_split(theirs, text, ids, path) for text, ids in zip(PROBES, plain, strict=True)}
    if len(found) != 1:
        raise UserError(f"{path}: transformers adds different special tokens to different texts")
    before, after = found.pop()
    return AddedTokens(list(before), list(after))


def _split(
    theirs: Any, text: str, plain: list[int], path: Path
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids before and after those of the text."""
    encoded = theirs(text, return_special_tokens_mask=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    start = mask.index(0) if 0 in mask else len(ids)
    end = start + len(plain)
    if ids[start:end] != plain or not all(mask[:start] + mask[end:]):
        raise UserError(
            f"{path}: transformers' {type(theirs).__name__} gives other ids of {text!r} "
            f"({ids}) than the tokenizer.json ({plain}): special tokens cannot be included. Leave "
            "--tokenizer-hf-include-special-tokens out, and give --append-bos where texts begin "
            "with it"
        )
    return tuple(ids[:start]), tuple(ids[end:])


def _load_with_transformers(path: Path) -> Any:
    try:
        import transformers

        if path.is_dir():
            return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # many kinds, from many places
        raise UserError(
            f"{path}: transformers cannot read it ({str(error).splitlines()[0]}), which "
            "--tokenizer-hf-include-special-tokens needs"
        ) from error


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
        self.path, self.added = path, AddedTokens([], [])
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
        self.added = find_added_tokens(self.path, plain)

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
                suggest_type(json_file, "HuggingFaceTokenizer")
                or ". Copy the file again, or save it with the version of the tokenizers library "
                "that is installed here"
            )
        ) from error
