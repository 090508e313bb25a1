"""Shell commands in the fenced blocks of the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from markdown_it import MarkdownIt

from tests.support.forks import ROOT

SHELL_LANGUAGES = ("bash", "sh", "shell", "console")
OUTSIDE_DOCS = ("README.md", "README.ja.md", "CONTRIBUTING.md", "SECURITY.md")

_OPERATORS = {"|", "||", "|&", "&&", ";", "&", "(", ")"}
_REDIRECTIONS = {">", ">>", "<", "<<", "<<<", ">&", "&>"}
_KEYWORDS = {"do", "then", "else", "if", "while", "until", "!", "time", "exec", "{"}
_NOT_COMMANDS = {"for", "done", "fi", "case", "esac", "}", "function", "["}
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_FURTHER_ARGUMENTS = re.compile(r"ARGUMENTS|\$\{?\w+(\[@\])?\}?|\$@")
_LOOKS_LIKE_A_COMMAND = re.compile(r"\s*(?:\$ )?[\w./-]*[\w/] +--?[A-Za-z][\w-]*")


@dataclass(frozen=True)
class Command:
    """One simple command: no pipes, no comments, continuation lines joined."""

    page: str
    """Path of the page, relative to the repository."""
    line: int
    words: tuple[str, ...]
    """Words after removal of quotes, without assignments, redirections and placeholders."""
    assignments: tuple[tuple[str, str], ...] = ()
    """Environment variables set for the command, or exported by it."""
    is_partial: bool = False
    """Whether ``...``, ``ARGUMENTS`` or a variable stands for further arguments."""

    def __str__(self) -> str:
        """Return the place and the text of the command."""
        return f"{self.page}:{self.line}: {' '.join(self.words)}"

    @property
    def text(self) -> str:
        """The words, separated by single spaces."""
        return " ".join(self.words)


def pages() -> list[str]:
    """Return the pages with commands, relative to the repository."""
    found = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("README.md")]
    paths = [*(ROOT / name for name in OUTSIDE_DOCS), *sorted(found)]
    return [path.relative_to(ROOT).as_posix() for path in paths]


def commands_of(page: str, programs: frozenset[str]) -> list[Command]:
    """Return the commands of a page.

    A block without a language contains commands if one of its lines starts with a program.

    Args:
        page: path relative to the repository.
        programs: names of all known programs.
    """
    found: list[Command] = []
    for line, language, text in _fenced_blocks(ROOT / page):
        if language in SHELL_LANGUAGES or (not language and _has_command(text, programs)):
            found.extend(parse_block(text, page, line))
    return found


def inline_commands(page: str, programs: Container[str]) -> list[Command]:
    """Return the commands in the text of a page: spans of code with a program and arguments.

    They are shortened: further arguments and values of flags may be missing.
    """
    found = []
    parser = MarkdownIt().enable("table")
    for block in parser.parse((ROOT / page).read_text(encoding="utf-8")):
        spans = [child.content for child in block.children or [] if child.type == "code_inline"]
        for span in spans:
            words = re.sub(r"\[(-[^]]*)\]", r"\1", span).split()  # [--optional VALUE]
            is_script = any((ROOT / word).is_file() for word in words[:1])
            if len(words) > 1 and (words[0] in programs or is_script):
                line = block.map[0] + 1 if block.map else 0
                first = next(parse_block(" ".join(words), page, line))
                found.append(replace(first, is_partial=True))
    return found


def comment_commands(path: Path, programs: frozenset[str]) -> list[Command]:
    """Return the commands in the comments of a script: indented, in paragraphs of their own."""
    text = path.read_text(encoding="utf-8")
    page = path.relative_to(ROOT).as_posix()
    return [
        command
        for match in re.finditer(r"(?:^#   .*\n)+", text, re.M)
        for block in [re.sub(r"^#   ", "", match[0], flags=re.M)]
        if _has_command(block, programs)
        for command in parse_block(block, page, text[: match.start()].count("\n") + 1)
    ]


def readme_fold_file() -> str:
    """Return the fold file of the README."""
    blocks = _fenced_blocks(ROOT / "README.md")
    (text,) = (text for _, language, text in blocks if language == "yaml")
    return text


def suspicious_lines(page: str, programs: frozenset[str]) -> list[str]:
    """Return the lines of blocks that are not commands, but look like one: PROGRAM --FLAG."""
    return [
        f"{page}:{number}: {line}"
        for start, language, text in _fenced_blocks(ROOT / page)
        if not language and not _has_command(text, programs)
        for number, line in enumerate(text.splitlines(), start)
        if _LOOKS_LIKE_A_COMMAND.match(line)
    ]


def parse_block(text: str, page: str, first_line: int) -> Iterator[Command]:
    """Yield the simple commands of a block."""
    lines = iter(enumerate(text.splitlines(), first_line))
    for start, line in lines:
        logical = line.removeprefix("$ ")
        while logical.endswith("\\") or _has_open_quote(logical):
            logical = logical.removesuffix("\\") + next(lines)[1]
        tokens = _tokens(logical)
        if "<<" in tokens:
            end = tokens[tokens.index("<<") + 1].lstrip("-")
            while next(lines)[1].strip() != end:
                pass
        for substituted in re.findall(r"\$\(([^()]+)\)", logical):
            yield from _simple_commands(_tokens(substituted), page, start)
        yield from _simple_commands(tokens, page, start)


def _fenced_blocks(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the number of the first line, the language and the text of each fenced block."""
    for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map is not None:
            yield token.map[0] + 2, token.info.split(" ")[0], token.content


def _has_command(text: str, programs: frozenset[str]) -> bool:
    for line in text.splitlines():
        words = line.removeprefix("$ ").split("#")[0].split()
        while words and _ASSIGNMENT.match(words[0]):
            del words[0]
        if words and (words[0] in programs or _is_path_of_program(words[0], programs)):
            return True
    return False


def _is_path_of_program(word: str, programs: frozenset[str]) -> bool:
    """Return whether a word is an existing script, or a program in a virtual environment."""
    path = ROOT / word
    is_script = path.suffix in (".sh", ".py", ".pbs") and path.is_file()
    return "/" in word and (is_script or Path(word).name in programs)


def _has_open_quote(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def _tokens(text: str) -> list[str]:
    reader = shlex.shlex(text, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    return list(reader)


def _simple_commands(tokens: list[str], page: str, line: int) -> Iterator[Command]:
    words: list[str] = []
    for token in [*tokens, ";"]:
        if token not in _OPERATORS:
            words.append(token)
            continue
        command = _command(words, page, line)
        if command is not None:
            yield command
        words = []


def _command(words: list[str], page: str, line: int) -> Command | None:
    """Return the command of the words between two operators; None if there is none."""
    words = _without_redirections(words)
    while words and words[0] in _KEYWORDS:
        del words[0]
    if not words or words[0] in _NOT_COMMANDS:
        return None
    exports = words[0] == "export"
    assigned = []
    rest = words[1:] if exports else list(words)
    while rest and _ASSIGNMENT.match(rest[0]):
        name, _, value = rest.pop(0).partition("=")
        assigned.append((name, value))
    kept = tuple(
        word
        for before, word in zip(["", *rest], rest, strict=False)
        if word != "..." and (before.startswith("-") or not _FURTHER_ARGUMENTS.fullmatch(word))
    )
    if not kept and not assigned:
        return None
    is_partial = len(kept) < len(rest)
    kept = ("export", *kept) if exports else kept
    return Command(page, line, kept, tuple(assigned), is_partial)


def _without_redirections(words: list[str]) -> list[str]:
    kept: list[str] = []
    skips = False
    for word in words:
        if word in _REDIRECTIONS:
            skips = True
            if kept and kept[-1] in ("1", "2"):
                kept.pop()
        elif skips:
            skips = False
        else:
            kept.append(word)
    return kept
