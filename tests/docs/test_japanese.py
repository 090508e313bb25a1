"""Japanese pages: the same code, structure and links as the English pages that they translate."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from pymdownx.slugs import slugify

from tests.support.processes import ROOT

TRANSLATED = {
    "README.md": "README.ja.md",
    **{f"docs/{path.name}": f"docs/ja/{path.name}" for path in (ROOT / "docs/ja").glob("*.md")},
}
"""Japanese page of each translated English page."""

PAGES = [page for page in TRANSLATED if page != "README.md"]
PARSER = MarkdownIt("commonmark").enable("table")
SLUG = slugify(case="lower")


def tokens(page: str):
    """Return the blocks of a page."""
    return PARSER.parse((ROOT / page).read_text(encoding="utf-8"))


def code_blocks(page: str) -> list[tuple[str, str]]:
    return [(t.info, t.content) for t in tokens(page) if t.type in ("fence", "code_block")]


def block_structure(page: str) -> list[str]:
    """Return the sequence of headings, paragraphs, list items and table rows."""
    kinds = ("heading_open", "paragraph_open", "list_item_open", "tr_open", "td_open", "fence")
    return [t.type + t.tag for t in tokens(page) if t.type in kinds]


def inline_code(page: str) -> list[str]:
    """Return the distinct code spans; their order differs between the languages."""
    return sorted(
        {c.content for t in tokens(page) for c in t.children or [] if c.type == "code_inline"}
    )


def heading_anchors(page: str) -> list[str]:
    found = tokens(page)
    texts = [found[i + 1].children for i, t in enumerate(found) if t.type == "heading_open"]
    return [SLUG("".join(c.content for c in children), "-") for children in texts]


def links(page: str) -> list[str]:
    children = [c for t in tokens(page) for c in t.children or []]
    found = [c.attrGet("href") for c in children if c.type == "link_open"]
    return found + [c.attrGet("src") for c in children if c.type == "image"]


def target(page: str, link: str) -> tuple[str, str | int]:
    """Return the target of a link as an English page and the number of a heading, if it has one."""
    if "://" in link:
        return link, ""
    path, _, anchor = link.partition("#")
    if path:
        path = os.path.normpath(PurePosixPath(page).parent / path)
        assert (ROOT / path).exists(), f"{page}: {link}"
    else:
        path = page
    english = {japanese: source for source, japanese in TRANSLATED.items()}
    if anchor and Path(path).suffix == ".md":
        anchors = [unquote(a) for a in heading_anchors(path)]
        assert unquote(anchor) in anchors, f"{page}: {link}: no such heading"
        return english.get(path, path), anchors.index(unquote(anchor))
    return english.get(path, path), anchor


@pytest.mark.parametrize("page", PAGES)
def test_code_and_structure_are_those_of_the_english_page(page):
    japanese = TRANSLATED[page]
    assert code_blocks(japanese) == code_blocks(page)
    assert block_structure(japanese) == block_structure(page)
    assert inline_code(japanese) == inline_code(page)


@pytest.mark.parametrize("page", PAGES)
def test_links_are_those_of_the_english_page(page):
    japanese = TRANSLATED[page]
    expected = sorted((target(page, link) for link in links(page)), key=str)
    found = sorted((target(japanese, link) for link in links(japanese)), key=str)
    assert found == expected
    folder = PurePosixPath(japanese).parent
    linked = {os.path.normpath(folder / link.partition("#")[0]) for link in links(japanese)}
    assert not linked & set(TRANSLATED), "link to the Japanese page"


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_english_page(page):
    """Figures with a decimal point or a thousands separator, which are written alike."""
    figure = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)+(?!\w|\.\w)", re.ASCII)
    found = {
        name: sorted(figure.findall((ROOT / name).read_text(encoding="utf-8")))
        for name in (page, TRANSLATED[page])
    }
    assert found[TRANSLATED[page]] == found[page]


def test_there_are_translations():
    names = {PurePosixPath(page).stem for page in PAGES}
    assert {"quickstart", "data", "training", "convert"} <= names
