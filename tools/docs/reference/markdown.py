"""Markdown that Python-Markdown (the site) and CommonMark (repositories) render alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

COMMAND = "python -m tools.docs.reference"

_CODE = re.compile(
    r"``(?P<double>[^`]+)``|`(?P<single>[^`]+)`"
    r"|(?P<page>docs/\w+\.md)"
    r"|(?P<flag>(?<![\w-])--[A-Za-z](?:[\w-]*\w)?)"
    r"|(?P<name>(?<![\w/-])(?:[A-Za-z0-9]+/)*[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+(?:\.[a-z]+)?(?!\w))"
)
"""Code in the text of help messages and docstrings: quoted, a page, a flag, a name with ``_``."""

_SPECIAL = re.compile(r"[\\`*_\[\]|]")


def code(text: str) -> str:
    """Format as code. A ``|`` is written between two parts, since tables divide cells there."""
    return "\\|".join(f"`{part}`" for part in text.split("|") if part)


def escape(text: str) -> str:
    """Return text in which no character is markup."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;")
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", plain)


def prose(text: str) -> str:
    """Format a help message or docstring: flags and names as code, pages as links, in one line."""
    text, parts, end = " ".join(text.split()), [], 0
    for found in _CODE.finditer(text):
        parts.append(escape(text[end : found.start()]))
        if found["page"]:
            parts.append(f"[{found[0]}](../{found[0].removeprefix('docs/')})")
        else:
            parts.append(code(found["double"] or found["single"] or found[0]))
        end = found.end()
    return "".join([*parts, escape(text[end:])])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines) + "\n"


def grouped(flags: Mapping[str, str]) -> dict[str, list[str]]:
    """Group flags by their text, in the order of the texts' first flags."""
    groups: dict[str, list[str]] = {}
    for flag, text in flags.items():
        groups.setdefault(text, []).append(flag)
    return groups


def join_page(title: str, source: str, *blocks: str) -> str:
    """Return a page that states where it comes from.

    Args:
        title: heading of the page.
        source: what the page is written from.
        blocks: paragraphs, headings and tables.
    """
    origin = f"Generated from {source} by {code(COMMAND)}."
    return "\n".join(f"{block.rstrip()}\n" for block in (f"# {title}", origin, *blocks))
