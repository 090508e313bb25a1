"""Whether a run is finished, from its save folder.

``report`` knows more states, but is a higher layer; here only the end matters.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_llmjp.checkpoint.run_lock import RECORD
from megatron_llmjp.metric_registry import EVENT, METRICS_FILE

_TAIL_BYTES = 1 << 18


def run_is_finished(save: Path) -> bool:
    """Return whether the last process of a run did all iterations and released the save folder.

    A run that was stopped, failed or killed may be resumed, and is not finished.
    """
    if (save / RECORD).exists():
        return False
    for line in reversed(_last_lines(save / METRICS_FILE)):
        event = _event(line)
        if event.get(EVENT) in ("start", "end"):
            return event[EVENT] == "end" and event.get("outcome") == "done"
    return False


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - _TAIL_BYTES))
            return stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _event(line: str) -> dict[str, object]:
    """Return the event of a line; empty if it has none, or is incomplete."""
    if f'"{EVENT}"' not in line:
        return {}
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
