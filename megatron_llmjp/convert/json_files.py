"""JSON objects in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llmjp.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, as UTF-8."""
    path.write_bytes(to_bytes(value))


def to_bytes(value: Mapping[str, Any]) -> bytes:
    """Return a JSON object as a file holds it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
