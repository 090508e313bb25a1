"""Types and default values of a JSON schema (pydantic's) as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tools.docs.reference.markdown import code, escape

Schema = Mapping[str, Any]

_NAMES = {"boolean": "true or false", "string": "text", "integer": "integer", "number": "number"}


def type_text(schema: Schema) -> str:
    """Return the type of a value as Markdown; a model is a link to its heading.

    Raises:
        ValueError: the schema has a form that is not known here.
    """
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(map(type_text, kinds))
    if "$ref" in schema:
        name = model_heading(schema["$ref"].rsplit("/", 1)[-1])
        return f"[{name.lower()}](#{name.lower().replace(' ', '-')})"
    if "enum" in schema or "const" in schema:
        return ", ".join(code(str(value)) for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array" and "prefixItems" in schema:
        items = schema["prefixItems"]
        return f"list of {len(items)}: " + ", ".join(map(type_text, items))
    if kind == "array":
        return f"list of {type_text(schema['items'])}"
    if kind == "object":
        return f"mapping of names to {type_text(schema['additionalProperties'])}"
    if kind not in _NAMES:
        raise ValueError(f"no text for the type {schema}")
    text = escape(_with_bounds(_NAMES[kind], schema))
    examples = " or ".join(code(str(example)) for example in schema.get("examples", ()))
    return f"{text}, such as {examples}" if examples else text


def _with_bounds(name: str, schema: Schema) -> str:
    """Return a number's type with its range, as ``0 <= number < 1``."""
    low, low_sign = schema.get("minimum"), ">="
    if "exclusiveMinimum" in schema:
        low, low_sign = schema["exclusiveMinimum"], ">"
    high, high_sign = schema.get("maximum"), "<="
    if "exclusiveMaximum" in schema:
        high, high_sign = schema["exclusiveMaximum"], "<"
    if low is not None and high is not None:
        return f"{low:g} {low_sign.replace('>', '<')} {name} {high_sign} {high:g}"
    if low is not None:
        return f"{name} {low_sign} {low:g}"
    return name if high is None else f"{name} {high_sign} {high:g}"


def default_text(schema: Schema) -> str:
    """Return the default of a value as Markdown; empty if it is not set, or none."""
    value = schema.get("default")
    return "" if value in (None, [], {}) else code(json.dumps(value).strip('"'))


def model_heading(name: str) -> str:
    """Return the heading of a model: ``FoldLearningRate`` is Fold learning rate."""
    return re.sub(r"(?<!^)([A-Z])", r" \1", name).capitalize()
