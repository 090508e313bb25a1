"""Findings of a diagnosis, and their presentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["ok", "missing", "broken"]
"""``missing``: not there, which is an error only if it is required. ``broken``: there, unusable."""


@dataclass(frozen=True)
class Finding:
    """A part of the installation or the machine."""

    name: str
    state: State
    found: str
    """Version, path or amount; the problem if it is not ``ok``."""
    needed_for: str
    remedy: str = ""
    """How to install or fix it."""
    required: bool = False
    """Whether nothing works without it."""

    @property
    def is_error(self) -> bool:
        """Whether this finding makes the installation unusable."""
        return self.state != "ok" and self.required


def format_findings(findings: Sequence[Finding]) -> str:
    """Return one line per finding; what is not ``ok`` has a second line with the remedy."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        label = "ERROR" if finding.is_error else finding.state
        lines.append(f"{label:<7}  {finding.name:<{width}}  {finding.found}")
        if finding.state != "ok":
            lines.append(f"{'':<{width + 11}}needed for {finding.needed_for}")
            lines.append(f"{'':<{width + 11}}{finding.remedy}")
    return "\n".join(lines)


def summarize(findings: Sequence[Finding]) -> str:
    """Return one line on what works."""
    errors = [finding.name for finding in findings if finding.is_error]
    broken = [f.name for f in findings if f.state == "broken" and not f.required]
    if errors:
        return f"not usable: {', '.join(errors)}"
    gpu = next((f for f in findings if f.name == "GPU"), None)
    device = "GPUs" if gpu is not None and gpu.state == "ok" else "a CPU"
    text = f"ready to train on {device}"
    return f"{text}; to repair: {', '.join(broken)}" if broken else text
