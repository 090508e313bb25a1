"""Parser of the lines of JSON Lines files, any of which may be damaged."""

from __future__ import annotations

import json
from typing import Any


def parse_object(line: str) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it is damaged or its text cannot be printed."""
    try:
        found = json.loads(line)
        if "\\u" in line:
            json.dumps(found, ensure_ascii=False).encode()  # raises for lone surrogates
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
