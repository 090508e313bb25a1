"""The result of a preflight check, for programs that depend on it. Without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = "preflight"
"""Folder of the check in the folder of a job's logs."""
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class PreflightResult:
    """Unfit nodes and common causes; both empty if the check passed or has no report."""

    unfit: dict[str, list[str]] = field(default_factory=dict)
    """Reasons of each unfit node."""
    common: list[str] = field(default_factory=list)
    """Causes that concern no single node."""


def read_result(logs: Path) -> PreflightResult:
    """Read the report of the check of a job; damaged parts are omitted.

    Args:
        logs: folder of the logs of a start of the job.
    """
    try:
        found = json.loads((logs / FOLDER / REPORT_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return PreflightResult()
    unfit, common = (found.get("unfit"), found.get("common")) if isinstance(found, dict) else (0, 0)
    reasons = {
        str(node): list(map(str, texts)) if isinstance(texts, list) else ["unknown"]
        for node, texts in (unfit.items() if isinstance(unfit, dict) else ())
    }
    return PreflightResult(reasons, list(map(str, common)) if isinstance(common, list) else [])
