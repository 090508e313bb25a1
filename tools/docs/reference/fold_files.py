"""Page of the fold files: the keys of each of their parts."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from megatron_llmjp.data.folds import schema as fold_schema
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
    yield table(HEADER, [*_rows(model, schema), *_rows(LoaderKeys, loader)])
    parts = schema.get("$defs", {})
    for name in _in_order(schema, parts):
        yield f"## {model_heading(name)}"
        yield prose(parts[name]["description"])
        yield table(HEADER, _rows(getattr(fold_schema, name), parts[name]))


def _rows(model: type[BaseModel], schema: Schema) -> Iterator[tuple[str, str, str, str]]:
    required, meanings = schema.get("required", ()), field_docstrings(model)
    for key, value in schema["properties"].items():
        if key not in meanings:
            raise ValueError(f"{model.__name__}: the key {key} has no description")
        default = "required" if key in required else default_text(value)
        yield code(key), type_text(value), default, prose(meanings[key])


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings of a model's fields, inherited ones included.

    pydantic's ``use_attribute_docstrings`` reads them at each import, which takes 25 ms.
    """
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if not issubclass(kind, BaseModel) or kind is BaseModel:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = ast.literal_eval(text.value)
    return found


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
