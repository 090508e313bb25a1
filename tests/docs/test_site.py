"""The site of the documentation: no warnings, readable offline, the same as in the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import markdown
import pytest
from markdown_it import MarkdownIt

from tests.support.processes import ROOT
from tools.docs.repository_links import linked_files, replace_links, site_uri

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    return folder


def test_pages_load_nothing_from_other_servers(site):
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|"
        r"<link\b[^>]*\brel=\"?stylesheet[^>]*\bhref=\"?(?:https?:)?//|url\(\"?https?:"
    )
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 20
    assert [path for path in files if loaded.search(path.read_text(encoding="utf-8"))] == []


def test_links_to_files_outside_of_docs_are_pages(site):
    data = (site / "data.html").read_text(encoding="utf-8")
    assert "examples/near_duplicates/" in data
    assert (site / "slurm/sites/abci.sh.html").is_file()
    script = (site / "slurm/sites/abci.sh.html").read_text(encoding="utf-8")
    assert "SBATCH" in script or "export" in script


def test_japanese_words_are_found(site):
    index = (site / "search/search_index.json").read_text(encoding="utf-8")
    assert '"ja"' in index
    assert "tinyseg" in " ".join(p.name for p in (site / "assets").rglob("*.js"))


class Blocks(HTMLParser):
    """The text of a page, with the lists, tables and headings that contain it."""

    NESTING = ("ul", "ol", "li", "pre", "table", "th", "td", "blockquote", "h1", "h2", "h3", "h4")

    def __init__(self, html):
        super().__init__()
        self.stack, self.found = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag in self.NESTING:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag in self.NESTING:
            self.stack.remove(tag)

    def handle_data(self, data):
        words = "".join(data.split())  # highlighting divides code into words
        place = ">".join(self.stack)
        if not words:
            return
        if self.found and self.found[-1][0] == place:
            words = self.found.pop()[1] + words
        self.found.append((place, words))


@pytest.mark.parametrize("page", PAGES)
def test_the_site_and_the_repository_show_the_same(page):
    """Python-Markdown, which MkDocs uses, against CommonMark, which repositories show."""
    text = (ROOT / page).read_text(encoding="utf-8")
    ours = Blocks(markdown.markdown(text, extensions=["tables", "pymdownx.superfences"])).found
    assert ours == Blocks(MarkdownIt("commonmark").enable("table").render(text)).found


def test_links_in_code_are_kept():
    text = (
        "[a](docs/data.md#x) `[a](docs/data.md)`\n```\n[a](docs/data.md)\n```\n[b](https://a/b.md)"
    )
    found = replace_links("README.md", text, lambda path, anchor: f"<{path}{anchor}>")
    assert found == text.replace("[a](docs/data.md#x)", "[a](<docs/data.md#x>)")


def test_linked_files_of_linked_files():
    found = {*linked_files(["README.md", "docs/data.md"])}
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "examples/near_duplicates/deduplicate.py"} <= found
    assert not [path for path in found if path.startswith("docs/")]
    assert site_uri("slurm/sites") == "slurm/sites/index.md"
    assert site_uri("README.ja.md") == "ja/index.md"
