"""Parsing of JSON lines, and the reasons why a line yields no document."""

from __future__ import annotations

import contextlib
import json
from typing import Any

try:
    import orjson
except ImportError:  # 4 % slower without
    orjson = None  # type: ignore[assignment]


class BadLine(ValueError):
    """A line that yields no document, with the reason to count it under and details."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def parse_line(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises:
        BadLine: the line is not UTF-8, not JSON or not an object.
    """
    with contextlib.suppress(ValueError):
        if orjson is not None and isinstance(record := orjson.loads(raw), dict):
            return record
    # The standard library is slower, but accepts slightly more and reports the error.
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        found = raw[error.start : error.start + 4].hex(" ")
        raise BadLine("invalid UTF-8", f"bytes {found} at byte {error.start + 1}") from error
    try:
        record = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BadLine("not valid JSON", f"{error}: {line[:60]!r}") from error
    if not isinstance(record, dict):
        raise BadLine("not a JSON object", f"found {type(record).__name__}: {line[:60]!r}")
    return record


def texts_of(record: dict[str, Any], key: str) -> list[str]:
    """Return the value of a key as a list of texts.

    Raises:
        BadLine: the key is missing, or its value is not text.
    """
    if key not in record:
        raise BadLine(
            "missing key", f"'{key}' is not among {', '.join(map(repr, list(record)[:8]))}"
        )
    value = record[key]
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise BadLine("not a string", f"'{key}' is {type(text).__name__} {str(text)[:40]}")
    return texts
