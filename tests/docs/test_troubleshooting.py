"""Messages quoted in docs/troubleshooting.md: each is in the source, word for word.

The source is searched as syntax trees: joined literals and f-strings become one text in which every
computed part is a mark. A quoted message becomes a pattern in which the words of ``VARIABLE`` stand
for computed parts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache

import pytest

from tests.support.forks import ROOT

PAGE = ROOT / "docs/troubleshooting.md"
FOLDERS = ("megatron_llmjp", "data_tools", "slurm")
MARK = "\0"
VARIABLE = re.compile(r"\b(?:N|NAME|PATH|VALUE|REASON|HOST|TEXT)(?:\b|(?=B are\b|B:))")
_BLOCK = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def quoted_messages() -> list[str]:
    return [" ".join(block.split()) for block in _BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


def template(node: ast.AST, constants: Mapping[str, str]) -> str | None:
    """Return the text of a string expression with marks, or None for another expression."""
    if isinstance(node, ast.FormattedValue):
        node = node.value
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, constants) or MARK for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left, constants), template(node.right, constants)
        return None if left is None and right is None else (left or MARK) + (right or MARK)
    return None


def module_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield names and values of the constants of a module, which messages of others contain."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = template(node.value, {})
            if text is not None and node.targets[0].id.isupper():
                yield node.targets[0].id, text


def python_templates(tree: ast.Module, constants: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        text = template(node, constants)
        if text is not None and " " in text:
            yield text


def shell_templates(source: str) -> Iterator[str]:
    joined = re.sub(r'"\s*\\\n\s*"', " ", source)
    for text in re.findall(r'"([^"\n]*)"', joined):
        yield re.sub(r"\$\{[^}]*\}|\$\w+", MARK, text)


@cache
def source_text() -> str:
    """Return all strings of the programs, one per line."""
    found: list[str] = []
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    constants = dict(item for tree in trees for item in module_constants(tree))
    for tree in trees:
        found += python_templates(tree, constants)
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.sh"):
            found += shell_templates(path.read_text(encoding="utf-8"))
    return "\n".join(" ".join(text.split()) for text in found)


def pattern(message: str) -> re.Pattern[str]:
    """Return the pattern of a quoted message; ``...`` at its end stands for anything."""
    message = re.sub(r"^(?:error|warning|note): ", "", message)
    fixed = VARIABLE.split(message.removesuffix("...").strip())
    return re.compile(f"{MARK}+".join(re.escape(part) for part in fixed))


def test_enough_messages_are_explained():
    messages = quoted_messages()
    assert len(messages) == len(set(messages)) >= 30


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_are_those_of_the_programs(message):
    fixed = "".join(VARIABLE.split(message))
    assert len(fixed) >= 15, "too little of the message is fixed"
    assert pattern(message).search(source_text()), "no program prints this: correct the page"


def test_a_message_that_no_program_prints_is_found():
    message = "no data: pass --fold-file, the file that defines the folds"
    assert pattern(message).search(source_text())
    assert not pattern(message.replace("folds", "blends")).search(source_text())
    assert pattern("eval_interval N is longer than").search(source_text())
    assert not pattern("eval_interval is N longer than").search(source_text())
