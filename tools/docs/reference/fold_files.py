"""Page of the fold files: the keys of each of their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from megatron_llmjp.data.folds.schema import FoldFile, LoaderKeys
from tools.docs.reference.markdown import code, join_page, prose, table
from tools.docs.reference.types import Schema, default_text, model_heading, type_text

INTRODUCTION = (
    "[Fold files](../folds.md) explains how the keys work together. Numbers with the suffixes "
    "K, M, B and T are powers of 1000. A key without a default that is not required is unset; "
    "unknown keys are errors."
)
HEADER = ("key", "type", "default", "meaning")


def page(model: type[BaseModel] = FoldFile) -> str:
    """Return the page of a model and all that it contains.

    Raises:
        ValueError: a key has no description.
    """
    return join_page(
        "Keys of fold files", "the schema of fold files", INTRODUCTION, *_blocks(model)
    )


def _blocks(model: type[BaseModel]) -> Iterator[str]:
    schema, loader = model.model_json_schema(), LoaderKeys.model_json_schema()
    yield f"## {model_heading(model.__name__)}"
    yield prose(schema["description"])
    yield table(HEADER, [*_rows(schema), *_rows(loader)])
    parts = schema.get("$defs", {})
    for name in _in_order(schema, parts):
        yield f"## {model_heading(name)}"
        yield prose(parts[name]["description"])
        yield table(HEADER, _rows(parts[name]))


def _rows(schema: Schema) -> Iterator[tuple[str, str, str, str]]:
    required = schema.get("required", ())
    for key, value in schema["properties"].items():
        if "description" not in value:
            raise ValueError(f"{schema['title']}: the key {key} has no description")
        default = "required" if key in required else default_text(value)
        yield code(key), type_text(value), default, prose(value["description"])


def _in_order(schema: Schema, parts: Schema) -> list[str]:
    """Return the names of the parts, in the order in which keys refer to them."""
    found: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).rsplit("/", 1)[-1]
            if name and name not in found:
                found.append(name)
                visit(parts[name]["properties"])
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(schema["properties"])
    return found
