"""Comparing tokenizers by what decides their ids: type, end of document and contents of files.

Where a file is stored and what it is called does not matter. An identity is what
``Tokenizer.identity`` returns, or what a dataset's manifest has recorded of it.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

Identity = Mapping[str, Any]


def key_of(identity: Identity) -> Hashable:
    """Equal for two tokenizers that give the same ids.

    The vocabulary's size follows from the files; it counts for types that have none. Settings are
    those of flags that a type needs next to its files (TikTokenizer).
    """
    sums = tuple(sorted(map(str, _files(identity).values())))
    size = None if sums else identity.get("vocab_size")
    settings = json.dumps(identity.get("settings"), sort_keys=True)
    return identity.get("type"), identity.get("eod_id"), size, sums, settings


def describe(identity: Identity) -> str:
    """A tokenizer in words: what decides its ids."""
    sums = sorted(str(digest)[:12] for digest in _files(identity).values())
    known = [f"{identity.get('vocab_size')} ids", f"EOD {identity.get('eod_id')}"]
    settings = identity.get("settings")
    if isinstance(settings, Mapping):
        known.append(f"pattern {settings.get('pattern')}")
        known.append(f"special tokens {settings.get('num_special_tokens')}")
    return f"{identity.get('type')} ({', '.join([*known, *sums])})"


def _files(identity: Identity) -> dict[str, Any]:
    files = identity.get("files")
    return dict(files) if isinstance(files, Mapping) else {}
