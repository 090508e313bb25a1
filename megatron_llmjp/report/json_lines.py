"""Values of JSON, and the lines of JSON Lines files, any of which may be damaged."""

from __future__ import annotations

import json
import math
from typing import Any


def json_values(value: Any) -> Any:
    """Return plain data with null for infinities and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_object(line: str) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it is damaged or its text cannot be printed."""
    try:
        found = json.loads(line)
        if "\\u" in line:
            json.dumps(found, ensure_ascii=False).encode()  # raises for lone surrogates
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
