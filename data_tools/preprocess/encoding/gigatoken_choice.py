"""Decision whether to encode with gigatoken (``--gigatoken``), by comparing its ids.

gigatoken is used if it reads the tokenizer and gives the same ids as the tokenizer's own library,
on text of the corpus and on texts that are made to be difficult. The ids are the same with and
without it, so that it is not part of what two datasets must have in common; the manifest records
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata

import numpy as np

from data_tools.preprocess.encoding.gigatoken_tokenizer import (
    GigatokenTokenizer,
    UnsupportedTokenizerError,
)
from data_tools.preprocess.encoding.sample import first_texts
from data_tools.preprocess.input.sources import InputSource
from data_tools.preprocess.selection.document_hooks import DocumentHooks
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer
from megatron_llmjp.tokenizers.base import panics_as_errors
from megatron_llmjp.tokenizers.comparison import COMMON_TEXTS, RARE_TEXTS
from megatron_llmjp.tokenizers.hugging_face import FastTokenizer

SAMPLE_BYTES = 500_000
SAMPLED_FILES = 16
COMPARED_VERSIONS = ("0.10",)
"""Versions of gigatoken whose ids were compared for every character of Unicode, in the tests."""
MAX_SPECIAL_TOKENS = 300
"""Special tokens that are tried in texts; vocabularies may have thousands of reserved ones."""
SPACES = " ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "\u2028", "\x0b", "\x85", "\0"
LONG = 2000
"""Characters of the long runs among the difficult texts."""


def choose_encoder(
    original: Tokenizer,
    mode: str,
    sources: Sequence[InputSource],
    keys: list[str],
    hooks: DocumentHooks | None = None,
) -> tuple[Tokenizer, str]:
    """Return the tokenizer to use, and a message with the reason.

    Args:
        original: the tokenizer.
        mode: ``auto`` or ``required``.
        sources: the input, of which a sample is compared.
        keys: JSON keys of the texts.
        hooks: functions that change the documents.

    Raises:
        UserError: the mode is ``required``, but gigatoken cannot be used.
    """
    if not isinstance(original, FastTokenizer):
        return original, _explain(mode, f"it does not read {original.kind}")
    try:
        _check_version()
        fast = GigatokenTokenizer(original)
    except ModuleNotFoundError:
        reason = "it is not installed (pip install 'megatron_llmjp[fast-data]')"
        return original, _explain(mode, reason)
    except (ImportError, UnsupportedTokenizerError) as error:
        return original, _explain(mode, f"it does not support this tokenizer: {error}")
    texts = [*difficult_texts(original), *_corpus_texts(sources, keys, hooks)]
    different = find_different(original, fast, texts)
    if different:
        reason = (
            f"{len(different):,} of {len(texts):,} texts give other ids, such as "
            f"{different[0][:40]!r}"
        )
        return original, _explain(mode, reason)
    return fast, f"Encoding with {fast.library}, which gives the same ids on {len(texts):,} texts."


def _explain(mode: str, reason: str) -> str:
    if mode == "required":
        raise UserError(
            f"--gigatoken required: {reason}. Give --gigatoken off to use the tokenizer's own "
            "library."
        )
    return f"Not encoding with gigatoken: {reason}."


def _check_version() -> None:
    """Check that this version of gigatoken was compared.

    Raises:
        ImportError: another version is installed, or none.
    """
    try:
        version = metadata.version("gigatoken")
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError("gigatoken") from error
    if not version.startswith(tuple(f"{known}." for known in COMPARED_VERSIONS)):
        expected = ", ".join(COMPARED_VERSIONS)
        raise ImportError(f"version {version} is not one of those compared ({expected})")


def find_different(original: Tokenizer, fast: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the texts that have other ids, or that only one of the tokenizers encodes."""
    expected = original.encode_batch(texts)
    different = []
    for text, ids in zip(texts, expected, strict=True):
        try:
            with panics_as_errors():
                is_same = np.array_equal(fast.encode(text), ids)
        except ValueError:
            is_same = False
        if not is_same:
            different.append(text)
    return different


def difficult_texts(tokenizer: FastTokenizer) -> Iterator[str]:
    """Yield texts that libraries often treat differently, with the special tokens among them."""
    yield from COMMON_TEXTS
    yield from RARE_TEXTS
    for space in SPACES:
        yield f"a{space}b{space * 2}c{space * 3}\n{space}d 1{space}"
        yield f"{space * LONG}x"
    for run in ("a", "A", "1", "-", "猫", "ab", "é", "\u0301", "👩‍", "'s"):
        yield run * LONG
    yield "I'm I'LL you'Re don’t it'ſ 'S 've'd\n'ss"
    yield "1²Ⅷ٣๏½ १२३ 12345678901234567890 1,234.50 ١٢٣"
    yield "ǅ ª ʰ İıſß Ω ﬁ ㎏ 한글 ᄒ\u1161ᆫ ﾊﾝｶｸ"
    yield "\ufeff\ufffd\U0010ffff\ue000\u0378\x80\x1c\u180e\u200b\u200d"
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    names = [added[number].content for number in sorted(added)]
    if len(names) > MAX_SPECIAL_TOKENS:
        names = names[: MAX_SPECIAL_TOKENS // 2] + names[-MAX_SPECIAL_TOKENS // 2 :]
    for name in names:
        yield f"a{name}b {name} c\n{name}\n{name}{name}  {name}  d{name[:-1]}"
        yield f"{name.upper()}1{name}2 {name}.{name}"


def _corpus_texts(
    sources: Sequence[InputSource], keys: list[str], hooks: DocumentHooks | None
) -> list[str]:
    """Return the first texts of some of the files; none of a pipe, which cannot be read twice."""
    files = [source for source in sources if source.seekable]
    step = max(1, -(-len(files) // SAMPLED_FILES))
    chosen = files[::step]
    texts: list[str] = []
    for source in chosen:
        texts += first_texts([source], keys, SAMPLE_BYTES // len(chosen), hooks)
    return texts
