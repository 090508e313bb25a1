"""MkDocs hook: links of the documentation to files outside of ``docs/``.

In the repository a page links to ``../CONTRIBUTING.md`` or ``../slurm/sites``, which MkDocs does
not know. Every linked file becomes a page of the site at the same path, and links are rewritten:
README.md is the start page, other Markdown files are rendered, text files are shown as code, and
folders are listed. The same links work in both views, and MkDocs checks them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
START_PAGES = {"README.md": "index.md", "README.ja.md": "ja/index.md"}
LEXERS = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".example": "bash", ".pbs": "bash"}
"""Highlighted languages by suffix; others are shown as text."""

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def site_uri(path: str) -> str:
    """Return the page of the site for a path of the repository (both with ``/``)."""
    if path in START_PAGES:
        return START_PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{path}/index.md"
    return path if path.endswith(".md") else f"{path}.md"


def target_path(page: str, link: str) -> str | None:
    """Return the repository path that a link on a page refers to.

    None if it is an address, a heading of the page, or no file or folder of the repository.
    """
    link = link.partition("#")[0]
    if not link or link.startswith("/") or "://" in link or link.startswith("mailto:"):
        return None
    path = os.path.normpath(f"{PurePosixPath(page).parent}/{link}")
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def replace_links(page: str, markdown: str, replace: Callable[[str, str], str]) -> str:
    """Replace the links of a page, except those in code.

    Args:
        page: its path in the repository.
        markdown: its text.
        replace: takes a repository path and the part from ``#`` on, and returns the link.
    """

    def one(match: re.Match[str]) -> str:
        path = target_path(page, match[2])
        if path is None:
            return match[0]
        hash_sign, anchor = match[2].partition("#")[1:]
        return match[1] + replace(path, hash_sign + anchor) + match[3]

    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(one, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _LINK.sub(one, markdown[end:])])


def links(page: str) -> set[str]:
    """Return the files and folders of the repository that a page links to."""
    found: set[str] = set()

    def record(path: str, anchor: str) -> str:
        found.add(path)
        return path + anchor

    replace_links(page, (ROOT / page).read_text(encoding="utf-8"), record)
    return found


def linked_files(pages: Iterable[str]) -> list[str]:
    """Return the files and folders outside of ``docs/`` that pages link to, directly or not.

    A folder is followed by its files.
    """
    found: list[str] = []
    waiting = [link for page in pages for link in sorted(links(page))]
    while waiting:
        path = waiting.pop(0)
        if path.startswith("docs/") or path in found:
            continue
        found.append(path)
        if path.endswith(".md"):
            waiting += sorted(links(path))
        elif (ROOT / path).is_dir():
            waiting += [f"{path}/{name}" for name in file_names(path)]
    return found


def file_names(folder: str) -> list[str]:
    """Return the names of the files in a folder of the repository."""
    return sorted(path.name for path in (ROOT / folder).iterdir() if path.is_file())


def page_text(path: str) -> str:
    """Return the Markdown of a page for a file or folder that is no Markdown file."""
    source = ROOT / path
    if source.is_dir():
        return f"# {path}\n\n" + "".join(f"- [{n}]({n}.md)\n" for n in file_names(path))
    lexer = LEXERS.get(source.suffix, "text")
    return f"# {path}\n\n````{lexer}\n{source.read_text(encoding='utf-8')}\n````\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings the anchors that they have in the repository view."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the start pages and all linked files outside of ``docs/``."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for path in [*START_PAGES, *linked_files([*START_PAGES, *pages])]:
        uri, source = site_uri(path), ROOT / path
        if uri in files.src_uris:
            continue
        if path.endswith(".md"):
            files.append(File.generated(config, uri, abs_src_path=str(source)))
        else:
            files.append(File.generated(config, uri, content=page_text(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to the pages of the site."""
    del config, files
    uri = page.file.src_uri
    start = {new: old for old, new in START_PAGES.items()}
    path = start.get(uri, uri if (ROOT / uri).is_file() else f"docs/{uri}")

    def relative(target: str, anchor: str) -> str:
        return os.path.relpath(site_uri(target), PurePosixPath(uri).parent) + anchor

    return replace_links(path, markdown, relative)
