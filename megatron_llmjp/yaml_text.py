"""YAML parsing into plain data with the line number of every key and list entry.

Reads all YAML files that users write: configurations and fold files. Only plain data is accepted:
mappings with text keys, lists, and scalars.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from megatron_llmjp.errors import UserError

YamlPath: TypeAlias = "tuple[str | int, ...]"
"""Position in nested data: mapping keys and list indices, outermost first."""

_STANDARD = "tag:yaml.org,2002:"
_MERGE = _STANDARD + "merge"
_PLAIN = {
    _STANDARD + name
    for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
}
MAX_VALUES = 300_000
"""Limit of values in a file; values of aliases count each time, since nesting multiplies them."""
MAX_NUMBER_LENGTH = 300
"""Limit of characters of an integer: Python refuses to print integers of more than 4300 digits."""


@dataclass(frozen=True)
class YamlDocument:
    """Contents of a YAML file."""

    source: str
    """Name of the file or other source."""
    data: dict[str, Any]
    lines: dict[YamlPath, str]
    """``file, line N`` of every key and list entry."""

    def where(self, at: tuple[Any, ...]) -> str:
        """Return the file and line of ``at``, or of its nearest parent that has one."""
        for end in range(len(at), 0, -1):
            if at[:end] in self.lines:
                return self.lines[at[:end]]
        return self.source


def read_yaml(path: Path, named_by: str) -> YamlDocument:
    """Read a file that holds one mapping.

    Args:
        path: the file.
        named_by: kind of file or flag that names it, for the error message.

    Raises:
        UserError: it cannot be read, or as for :func:`parse_yaml`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{named_by} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{named_by} {path} cannot be read: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> YamlDocument:
    """Parse a text that holds one mapping, or nothing.

    Args:
        text: the YAML.
        source: the file, for messages.

    Raises:
        UserError: it is not YAML or not a mapping; a key is not text or is duplicated; it has a tag
            other than those of plain data, an excessively long number, or recursive or excessively
            nested aliases.
    """
    loader = yaml.SafeLoader("")
    try:
        loader = yaml.SafeLoader(text)
        loader.name = source  # in the marks of nodes and errors
        root = loader.get_single_node()
        # Before construction, which replaces merge keys by their contents.
        written = _places(root, source)
        data = loader.construct_document(root) if root is not None else {}
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: it is nested too deeply") from None
    except ValueError as error:  # of an invalid date or number
        raise UserError(f"{source}: not valid YAML: {error}; put the value in quotes") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError):  # such as "!!bool 3"
        raise UserError(f"{source}: not valid YAML: a value does not match its tag") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{source}: the file: expected keys and values, found {found}")
    return YamlDocument(source, data, written)


def _places(root: yaml.Node | None, source: str) -> dict[YamlPath, str]:
    lines: dict[YamlPath, str] = {}
    for number, (at, node) in enumerate(_walk(root, (), ())):
        if number == MAX_VALUES:
            raise UserError(
                f"{source}: more than {MAX_VALUES:,} values: do not nest aliases (*name)"
            )
        lines.setdefault(at, _where(node))
    return lines


def _where(node: yaml.Node) -> str:
    return f"{node.start_mark.name}, line {node.start_mark.line + 1}"


def _walk(
    node: yaml.Node | None, at: YamlPath, inside: tuple[yaml.Node, ...]
) -> Iterator[tuple[YamlPath, yaml.Node]]:
    """Yield every key and list entry below a node, those of merge keys last."""
    if node is None:
        return
    if node in inside:
        raise UserError(f"{_where(node)}: an anchor (&name) that contains itself")
    if node.tag not in _PLAIN:
        name = node.tag.replace(_STANDARD, "!!")
        raise UserError(f"{_where(node)}: the tag {name} is not supported: write plain values")
    if node.tag == _STANDARD + "int" and len(node.value) > MAX_NUMBER_LENGTH:
        raise UserError(
            f"{_where(node)}: a number of {len(node.value):,} characters; if it is "
            "text, put the value in quotes"
        )
    inside = (*inside, node)
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield (*at, number), entry
            yield from _walk(entry, (*at, number), inside)
    if isinstance(node, yaml.MappingNode):
        yield from _walk_mapping(node, at, inside)


def _walk_mapping(
    node: yaml.MappingNode, at: YamlPath, inside: tuple[yaml.Node, ...]
) -> Iterator[tuple[YamlPath, yaml.Node]]:
    merged: list[yaml.Node] = []
    seen: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if key.tag == _MERGE:
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            continue
        name = _key(key)
        if name in seen:
            raise UserError(
                f"{_where(key)}: '{name}' is given twice, first in line "
                f"{seen[name].start_mark.line + 1}: remove one"
            )
        seen[name] = key
        yield (*at, name), key
        yield from _walk(value, (*at, name), inside)
    for value in merged:
        yield from _walk(value, at, inside)


def _key(key: yaml.Node) -> str:
    """Return the text of a key."""
    if not isinstance(key, yaml.ScalarNode):
        kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
        raise UserError(
            f"{_where(key)}: a key is a {kind}, expected text (a key in [brackets] or {{braces}}?)"
        )
    if key.tag != _STANDARD + "str":
        kind = key.tag.removeprefix(_STANDARD)
        raise UserError(
            f"{_where(key)}: the key {key.value} is of type {kind}, expected text: write it in "
            f'quotes, "{key.value}"'
        )
    return str(key.value)
