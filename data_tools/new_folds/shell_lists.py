"""Lists of datasets in shell scripts and pasted text, as in the arguments of Megatron-LM.

Understood are a bare list (``WEIGHT PATH WEIGHT PATH ...``), assignments that extend a variable
(``TRAIN_DATA_PATH="${TRAIN_DATA_PATH} WEIGHT PATH"``, as in llm-jp-3's scripts, or arrays), and
command lines with ``--data-path`` or ``--train-data-path``. Nothing is executed: text that only a
shell can expand is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_llmjp.errors import UserError

_ASSIGNMENT = re.compile(r"[ \t]*(?:(?:export|declare(?:[ \t]+-\w+)*|local)[ \t]+)?(\w+)(\+?)=")
_PIECE = re.compile(
    r"""
    '(?P<single>[^']*)'
    | "(?P<double>(?:\\.|[^"\\])*)"
    | (?P<comment>(?<![^\s(])\#[^\n]*)
    | (?P<call>\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`)
    | (?P<space>(?:\s|\\\n)+)
    | (?P<end>[;&|<>])
    | (?P<bracket>[()])
    | (?P<text>(?:\$\{\w+(?:\[[@*]\])?\}|\$\w+|[^\s'"\\`$;&|<>()])+|\\.|.)
    """,
    re.X | re.S,
)
_VARIABLE = re.compile(r"\$\{(\w+)(?:\[[@*]\])?\}|\$(\w+)")
_FLAG = re.compile(r"(?<!\S)--(?:(train|valid|test)[-_])?data[-_]path(?=[\s=])[\s=]*")
_SPLIT = re.compile(r"(?<!\S)--split[\s=]+[\"']?([\d.,]+)")
_NEXT_FLAG = re.compile(r"(?<!\S)-{1,2}[A-Za-z]")
MAX_CHARACTERS = 1_000_000
"""Limit of a text and of each variable: expansion of variables could multiply them."""


@dataclass(frozen=True)
class DatasetLists:
    """Words of the lists in a text."""

    train: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    split: str | None = None
    """Argument of ``--split`` in the text."""


@dataclass
class _Variables:
    values: dict[str, str] = field(default_factory=dict)

    def expand(self, text: str, own: str = "") -> str:
        """Replace the known variables; ``own``, the variable being assigned, may be undefined."""

        def value(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            if name in self.values:
                return self.values[name]
            return "" if name == own else os.environ.get(name, match[0])

        return _VARIABLE.sub(value, text)

    def evaluate(self, raw: str, own: str = "", words: bool = False) -> str:
        """Return the value of a shell word, or of several ``words``, without comments and quotes.

        Variables and commands without a known value remain as they are.
        """
        found = []
        for piece in _PIECE.finditer(raw):
            kind, text = str(piece.lastgroup), piece[str(piece.lastgroup)]
            if kind == "end" or (kind == "space" and not words):
                break
            if kind == "double":
                found.append(self.expand(re.sub(r"\\(.)", r"\1", text, flags=re.S), own))
            elif kind in ("single", "call", "bracket"):
                found.append(text)
            elif kind == "space":
                found.append(" ")
            elif kind == "text":
                found.append(self.expand(text, own))
        return "".join(found)


def parse_lists(text: str, where: str) -> DatasetLists:
    """Return the lists of datasets in a text.

    Args:
        text: a script, a part of one, or a list.
        where: name of the text, for messages.

    Raises:
        UserError: there is no list, or a part of it is known to a shell only.
    """
    if len(text) > MAX_CHARACTERS or "\0" in text:
        raise UserError(f"{where}: not a script or a list: it is larger than 1 MB or binary")
    variables = _Variables()
    for name, adds, raw in _assignments(text, where):
        is_array = raw.startswith("(")
        value = variables.evaluate(raw[1:-1] if is_array else raw, own=name, words=is_array)
        before = variables.values.get(name, "") if adds else ""
        value = f"{before} {value}" if is_array and before else before + value
        if len(value) > MAX_CHARACTERS:
            raise UserError(f"{where}: the value of {name} is larger than 1 MB")
        variables.values[name] = value
    lists = _lists_of_flags(text, variables) or _lists_of_variables(variables.values)
    if not lists and not variables.values:
        lists = {"train": variables.evaluate(text, words=True)}
    found = {part: tuple(words.split()) for part, words in lists.items()}
    if not found.get("train"):
        raise UserError(
            f"{where}: no list of datasets. Expected WEIGHT PATH pairs or paths, assignments of "
            "TRAIN_DATA_PATH or DATA_PATH, or a command with --data-path"
        )
    for words in found.values():
        _refuse_unexpanded(words, where)
    split = _SPLIT.search(_without_comments(text))
    return DatasetLists(**found, split=split[1] if split else None)


def _assignments(text: str, where: str) -> Iterator[tuple[str, bool, str]]:
    """Yield name, whether it is ``+=``, and value of each assignment at the start of a line."""
    at = 0
    while at < len(text):
        match = _ASSIGNMENT.match(text, at)
        newline = text.find("\n", at)
        at = newline + 1 if newline >= 0 else len(text)
        if match is not None:
            end = _value_end(text, match.end(), f"{where}: {match[1]}")
            yield match[1], bool(match[2]), text[match.end() : end]
            at = max(at, end)


def _value_end(text: str, start: int, where: str) -> int:
    """Return the end of a value: of a word, which may have quoted parts, or of an array.

    Raises:
        UserError: an array has no end.
    """
    depth, at = 0, start
    while at < len(text):
        piece = _PIECE.match(text, at)
        assert piece is not None  # it matches any character
        depth += piece[0].count("(") - piece[0].count(")") if piece.lastgroup == "bracket" else 0
        if depth <= 0 and piece.lastgroup in ("space", "end"):
            break
        at = piece.end()
        if depth <= 0 and piece.lastgroup == "bracket":
            break
    if depth > 0:
        raise UserError(f"{where}: the array has no closing parenthesis")
    return at


def _without_comments(text: str) -> str:
    return re.sub(r"(?m)(?<!\S)#.*$", "", text).replace("\\\n", " ")


def _lists_of_flags(text: str, variables: _Variables) -> dict[str, str]:
    """Return the lists given to ``--data-path`` and its variants, by part."""
    plain, found = _without_comments(text), {}
    for flag in _FLAG.finditer(plain):
        newline = plain.find("\n", flag.end())
        end = newline if newline >= 0 else len(plain)
        following = _NEXT_FLAG.search(plain, flag.end(), end)
        end = following.start() if following else end
        words = variables.evaluate(plain[flag.end() : end], words=True)
        if words.strip():
            found[flag[1] or "train"] = words
    return found


def _lists_of_variables(values: Mapping[str, str]) -> dict[str, str]:
    """Return the lists in variables such as ``TRAIN_DATA_PATH`` and ``DATA_PATH``, by part."""
    found = {}
    for name, value in values.items():
        match = re.fullmatch(r"(?:(TRAIN|VALID|TEST)_)?DATA_PATHS?", name)
        if match and value.strip():
            found[(match[1] or "train").lower()] = value
    return found


def _refuse_unexpanded(words: tuple[str, ...], where: str) -> None:
    for word in words:
        if "$" in word or "`" in word:
            name = _VARIABLE.fullmatch(word.split("/")[0])
            what = (
                f"the variable {word.split('/')[0]} is not assigned in this text or the environment"
                if name
                else "only a shell can expand it"
            )
            raise UserError(
                f"{where}: '{word[:200]}' in the list of datasets: {what}. Pass the expanded list: "
                "bash -c '. ./SCRIPT; echo \"${TRAIN_DATA_PATH[@]}\"' | plan_folds ... "
                "--data-list -"
            )
