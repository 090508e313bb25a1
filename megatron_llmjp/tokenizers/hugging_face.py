"""Hugging Face fast tokenizers: a tokenizer.json, or a folder that contains one.

They are read with the ``tokenizers`` library alone, because importing transformers takes seconds.
The template of the tokenizer.json, which may add BOS or EOS, is not applied, as in megatron-core
0.16, unless ``include_special_tokens`` is called; ``--append-eod`` ends a document.

The special tokens that transformers adds around a text depend on the template of the
tokenizer.json, on ``add_bos_token`` and ``add_eos_token`` of its configuration, on the tokenizer's
class and on the release of transformers. They are therefore found by encoding a few texts with
transformers.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from megatron_llmjp.errors import UserError, download_hint
from megatron_llmjp.tokenizers.base import Ids, Tokenizer, panics_as_errors
from megatron_llmjp.tokenizers.file_types import suggest_type

PROBE_TEXTS = ("a", "Hello world.\n 1,234", "吾輩は猫である。")
COMPANION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
PREFIX_SPACE_CLASSES = ("GPT2", "Roberta", "Bart")
"""Classes of transformers whose ``add_prefix_space`` overrides the tokenizer.json's."""
DECLARED = "added_tokens_decoder"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Without an eos token in tokenizer_config.json, the first of these in the vocabulary is used.
EOD_CANDIDATES = ("<EOD>", "<EOD|LLM-jp>", "<|eod|>", "<|endoftext|>", "</s>", "<eos>")


class FastTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library, without added special tokens.

    Attributes:
        tokenizer: the library's object.
    """

    tokenizer: tokenizers.Tokenizer

    def encode(self, text: str) -> Ids:
        """Return the ids of one text, without the special tokens of the template."""
        _check_encodable(text)
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, encoded as a batch."""
        for text in texts:
            _check_encodable(text)
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text, including special tokens."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def piece(self, token_id: int) -> str:
        """Return the token of one id as in the vocabulary."""
        return str(self.tokenizer.id_to_token(int(token_id)))


def _check_encodable(text: str) -> None:
    text.encode()  # for a lone surrogate the library itself raises a bare TypeError


class AddedTokens(NamedTuple):
    """Ids of the special tokens before and after each text."""

    before: list[int]
    after: list[int]


def find_added_tokens(path: Path, plain: list[list[int]]) -> AddedTokens:
    """Return the special tokens that ``AutoTokenizer`` adds to a text.

    Args:
        path: a tokenizer.json, or a folder that transformers reads.
        plain: ids of PROBE_TEXTS without added tokens, as encoded by this module.

    Raises:
        UserError: transformers cannot read the tokenizer, or gives different ids for the text.
    """
    theirs = _load_with_transformers(path)
    found = {
        _split_added_ids(theirs, text, ids, path)
        for text, ids in zip(PROBE_TEXTS, plain, strict=True)
    }
    if len(found) != 1:
        raise UserError(f"{path}: transformers adds different special tokens to different texts")
    before, after = found.pop()
    return AddedTokens(list(before), list(after))


def _split_added_ids(
    theirs: Any, text: str, plain: list[int], path: Path
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the added ids before and after those of the text."""
    encoded = theirs(text, return_special_tokens_mask=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    start = mask.index(0) if 0 in mask else len(ids)
    end = start + len(plain)
    if ids[start:end] != plain or not all(mask[:start] + mask[end:]):
        raise UserError(
            f"{path}: transformers' {type(theirs).__name__} gives other ids for {text!r} "
            f"({ids}) than the tokenizer.json ({plain}): special tokens cannot be included. Remove "
            "--tokenizer-hf-include-special-tokens, and give --append-bos if texts start with BOS"
        )
    return tuple(ids[:start]), tuple(ids[end:])


def _load_with_transformers(path: Path) -> Any:
    try:
        import transformers

        if path.is_dir():
            return transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # transformers raises many types
        raise UserError(
            f"{path}: transformers cannot read the tokenizer ({str(error).splitlines()[0]}), as "
            "--tokenizer-hf-include-special-tokens requires"
        ) from error


class HuggingFaceTokenizer(FastTokenizer):
    """A fast tokenizer; end of document is its ``eos_token``, or one of EOD_CANDIDATES."""

    kind = "HuggingFaceTokenizer"

    def __init__(self, path: Path) -> None:
        self.path, self.added = path, AddedTokens([], [])
        self.json_file = path / "tokenizer.json" if path.is_dir() else path
        settings = _read_settings(self.json_file.parent)
        self.tokenizer = _load(path, self.json_file)
        _apply_settings(settings, self.tokenizer)
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1  # not their number: ids may have gaps
        self.bos_id = self._id_of(settings.get("bos_token"))
        self.pad_id = self._id_of(settings.get("pad_token"))
        self.eos_id = self._id_of(settings.get("eos_token"))
        likely = (self._id_of(name) for name in EOD_CANDIDATES)
        eod = self.eos_id if self.eos_id is not None else next(filter(_is_known, likely), None)
        if eod is None:
            raise UserError(
                f"{self.json_file}: no end-of-document token. Expected an eos_token in the "
                f"tokenizer_config.json of its folder, or one of {', '.join(EOD_CANDIDATES)} in "
                "its vocabulary."
            )
        self.eod_id = eod

    def include_special_tokens(self) -> None:
        """Include the special tokens that transformers adds in all further encodings.

        Raises:
            UserError: as :func:`find_added_tokens`.
        """
        plain = [super(HuggingFaceTokenizer, self).encode(text).tolist() for text in PROBE_TEXTS]
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
        """Return the id of a token given as in the configuration: a string or a mapping."""
        name = token.get("content") if isinstance(token, dict) else token
        return self.tokenizer.token_to_id(name) if isinstance(name, str) else None

    def files(self) -> dict[str, Path]:
        """Return tokenizer.json, under this name, and the other files that transformers reads."""
        companions = {name: self.json_file.parent / name for name in COMPANION_FILES}
        found = {name: path for name, path in companions.items() if path.is_file()}
        return {"tokenizer.json": self.json_file} | found

    def identifying_files(self) -> list[Path]:
        """Return the file that determines the ids."""
        return [self.json_file]


def _is_known(token_id: int | None) -> bool:
    return token_id is not None


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the special tokens and settings in the folder's configuration files.

    Raises:
        UserError: a file is damaged.
    """
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: invalid JSON ({error}). Copy the file again.") from error
            if not isinstance(found, dict):
                raise UserError(f"{path}: not a JSON object. Copy the file again.")
            if wrong := [key for key, token in _declared_tokens(found) if not _is_token(token)]:
                found_text = reprlib.repr(found[wrong[0]])
                raise UserError(
                    f"{path}: {wrong[0]}: expected a token or tokens, found {found_text}. Copy the "
                    "file again."
                )
            settings.update(found)
    return settings


def _declared_tokens(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tokens in a configuration with their keys; None for a value of another type."""
    for role in ROLES:
        if token := settings.get(f"{role}_token"):
            yield f"{role}_token", token
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = settings.get(name) or []
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        yield from ((name, token) for token in (tokens if isinstance(tokens, list) else [None]))
    declared = settings.get(DECLARED) or {}
    is_valid = isinstance(declared, dict) and all(re.fullmatch(r"[0-9]{1,18}", i) for i in declared)
    yield from ((DECLARED, token) for token in (declared.values() if is_valid else [None]))


def _is_token(token: Any) -> bool:
    """Return whether a value is a token: a text, or a mapping with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return isinstance(text, str) and text.encode(errors="ignore").decode() == text


def _apply_settings(settings: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> None:
    """Apply the configuration to a tokenizer as transformers' AutoTokenizer does.

    Truncation and padding are disabled, since transformers takes them from the call. Tokens that
    only the configuration defines are added.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    split = tokenizer.pre_tokenizer
    named = str(settings.get("tokenizer_class") or "").startswith(PREFIX_SPACE_CLASSES)
    if named and isinstance(split, tokenizers.pre_tokenizers.ByteLevel):
        split.add_prefix_space = bool(settings.get("add_prefix_space", False))
        tokenizer.pre_tokenizer = split
    declared = settings.get(DECLARED) or {}
    known = tokenizer.get_vocab(with_added_tokens=True)
    extra = [settings.get(f"{role}_token") for role in ROLES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = settings.get(name) or []
        extra += tokens.values() if isinstance(tokens, dict) else tokens
    added = [
        _added_token(token) for _, token in sorted(declared.items(), key=lambda pair: int(pair[0]))
    ]
    added += [_added_token(token, special=True) for token in extra if token]
    tokenizer.add_tokens([token for token in added if token.content not in known])


def _added_token(token: Any, special: bool = False) -> tokenizers.AddedToken:
    """Return a token given as in the configuration: a string or a mapping."""
    if not isinstance(token, dict):
        return tokenizers.AddedToken(str(token), special=special)
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    given = {name: bool(token[name]) for name in flags if name in token}
    return tokenizers.AddedToken(token["content"], **({"special": special} | given))


def _load(given: Path, json_file: Path) -> tokenizers.Tokenizer:
    if not json_file.is_file():
        missing = f"does not exist{download_hint(given)}"
        what = missing if not given.exists() else "contains no tokenizer.json"
        raise UserError(
            f"--tokenizer-model {given}: {what}. Expected a tokenizer.json or a folder with one "
            "(a fast tokenizer; for a SentencePiece *.model use SentencePieceTokenizer)."
        )
    try:
        with panics_as_errors():
            return tokenizers.Tokenizer.from_file(str(json_file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{json_file}: not a readable tokenizer.json ({str(error)[:300]})"
            + (
                suggest_type(json_file, "HuggingFaceTokenizer")
                or ". Copy the file again, or save it with the installed version of the "
                "tokenizers library"
            )
        ) from error
