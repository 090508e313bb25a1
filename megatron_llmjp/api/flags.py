"""Keyword arguments as the command-line flags of the same names."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any


def flag_words(fields: dict[str, Any]) -> list[str]:
    """Return ``--some-field value`` for each keyword.

    True is the flag alone, False its ``--no-`` form, None omits it, and a list has several words.
    """
    words: list[str] = []
    for name, value in fields.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Iterable) and not isinstance(value, (str, PathLike)):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words
