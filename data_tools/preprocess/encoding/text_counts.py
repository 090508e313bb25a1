"""Counts of encoded documents by language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.statistics.counts import CountsByLanguage, TextCounts

DEFAULT_LANGUAGE_KEY = "lang"
MAX_LANGUAGE_LENGTH = 35
"""Characters of the longest language tag (RFC 5646, section 4.4.1); other values are not tags."""
MAX_LANGUAGES = 200
"""Languages counted per source; a key with more values does not hold languages."""
OTHER_LANGUAGES = "(other)"


def language_of(record: Mapping[str, Any], key: str) -> str:
    """Return the language of a record; an empty string if it has none.

    Args:
        record: a JSON object.
        key: its key; ``meta.lang`` is the key ``lang`` of the object ``meta``.
    """
    value: Any = record.get(key)
    if value is None and "." in key:
        value = record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value.isprintable():
        return ""
    return value if len(value) <= MAX_LANGUAGE_LENGTH else OTHER_LANGUAGES


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def count_texts(
    documents: Sequence[Sequence[str]], languages: Sequence[str], lengths: npt.NDArray[np.int64]
) -> CountsByLanguage:
    """Return the counts of documents by language.

    Args:
        documents: the texts of each document.
        languages: the language of each document.
        lengths: tokens of each document.
    """
    sizes = np.array(
        [sum(map(_utf8_bytes, texts)) for texts in documents],
        np.int64,
    )
    found: CountsByLanguage = {}
    names, numbers = np.unique(np.array(languages, dtype=object), return_inverse=True)
    for number, name in enumerate(names.tolist()):
        chosen = numbers == number
        found[name] = TextCounts.of(lengths[chosen], int(sizes[chosen].sum()))
    return found


def add_texts(total: dict[str, CountsByLanguage], more: Mapping[str, CountsByLanguage]) -> None:
    """Add the counts of a block by key and language to those of its source."""
    for key, languages in more.items():
        of_key = total.setdefault(key, {})
        for language, counts in languages.items():
            if language not in of_key and len(of_key) >= MAX_LANGUAGES:
                language = OTHER_LANGUAGES
            of_key.setdefault(language, TextCounts()).add(counts)
