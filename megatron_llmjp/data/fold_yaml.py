"""YAML text -> plain data that remembers where each of its parts was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_llmjp.errors import UserError

At = tuple[Any, ...]
"""A place in nested data: keys of mappings and numbers in lists, outermost first."""
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Written:
    """The contents of a file."""

    path: Path
    data: dict[str, Any]
    lines: dict[At, str]
    """``file, line N`` of every key and list entry."""

    def where(self, at: At) -> str:
        """The place nearest to ``at`` that was written."""
        for end in range(len(at), 0, -1):
            if at[:end] in self.lines:
                return self.lines[at[:end]]
        return str(self.path)


def read_yaml(path: Path, named_by: str) -> Written:
    """Read a file that holds one mapping.

    Args:
        path: the file.
        named_by: who names it, for the message when it cannot be read.

    Raises:
        UserError: it cannot be read, is no YAML, no mapping, or a key occurs twice in a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{named_by} {path} cannot be read: {error}") from None
    try:
        loader = yaml.SafeLoader(text)
        loader.name = str(path)  # in the marks of nodes and errors
        root = loader.get_single_node()
        # First, as constructing puts the contents of merge keys in their place.
        written = list(_walk(root, (), frozenset()))
        data = loader.construct_document(root) if root is not None else None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{path}: the file: expected keys such as `folds:`, found {found}")
    lines: dict[At, str] = {}
    for at, node in written:
        where = f"{path}, line {node.start_mark.line + 1}"
        lines.setdefault(at, where)
    return Written(path, data, lines)


def _walk(node: yaml.Node | None, at: At, inside: frozenset[int]) -> Iterator[tuple[At, yaml.Node]]:
    """Every key and list entry below a node; what a merge key brings comes after its own."""
    if id(node) in inside:  # an anchor that contains itself
        return
    inside |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield (*at, number), entry
            yield from _walk(entry, (*at, number), inside)
    if isinstance(node, yaml.MappingNode):
        merged: list[yaml.Node] = []
        seen: dict[Any, yaml.Node] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            if key.value in seen:
                mark, first = key.start_mark, seen[key.value].start_mark.line + 1
                raise UserError(
                    f"{mark.name}, line {mark.line + 1}: '{key.value}' is given twice, first in "
                    f"line {first}: take one away"
                )
            seen[key.value] = key
            yield (*at, key.value), key
            yield from _walk(value, (*at, key.value), inside)
        for value in merged:
            yield from _walk(value, at, inside)
