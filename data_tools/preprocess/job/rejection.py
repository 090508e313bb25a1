"""Limits on rejected lines: a run that exceeds them, or finds no documents, fails."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.preprocess.job.journal import SourceCounts
from data_tools.statistics.removed import sum_removed
from megatron_llmjp.errors import UserError

MIN_REJECTED_TO_STOP_EARLY = 1000
"""Rejected lines after which a run stops early if most of its lines are rejected."""


@dataclass(frozen=True)
class RejectionLimits:
    """Limits on rejected lines and on datasets without tokens.

    Attributes:
        max_rejected: maximum share of rejected lines, among rejected lines and documents.
        allow_empty: allow datasets without tokens.
    """

    max_rejected: float
    allow_empty: bool

    def check_early(self, counts: Sequence[SourceCounts]) -> None:
        """Stop a run that rejects most of its lines before it has read all input.

        Raises:
            UserError: more than half of the lines, and more than the limit, were rejected.
        """
        if _reasons(counts).total() >= MIN_REJECTED_TO_STOP_EARLY:
            self._check_rejected(counts, max(self.max_rejected, 0.5))

    def check(self, counts: Sequence[SourceCounts], keys: Sequence[str]) -> None:
        """Check a run that has read all input.

        Raises:
            UserError: too many lines were rejected, or a dataset would have no tokens.
        """
        self._check_rejected(counts, self.max_rejected)
        empty = [key for key in keys if not any(found.tokens.get(key, 0) for found in counts)]
        if empty and not self.allow_empty:
            lines = sum(source_counts.lines for source_counts in counts)
            rejected = _reasons(counts).total()
            removed = sum_removed(source_counts.removed for source_counts in counts)
            by_reason = "".join(f", {n:,} removed as {name}" for name, n in removed.items() if n)
            raise UserError(
                f"no tokens for --json-keys {' '.join(empty)}: {lines:,} lines were read, "
                f"{rejected:,} of them rejected{by_reason}. Check --input and --json-keys, or give "
                "--allow-empty to write an empty dataset."
            )

    def _check_rejected(self, counts: Sequence[SourceCounts], limit: float) -> None:
        reasons = _reasons(counts)
        rejected = reasons.total()
        total = rejected + sum(found.documents + sum(found.removed.values()) for found in counts)
        if rejected <= limit * total:
            return
        listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        raise UserError(
            f"{rejected:,} of {total:,} lines were rejected ({rejected / total:.1%}): {listed}. "
            f"--max-rejected is {self.max_rejected:.4%}. Fix the input or --json-keys, or run the "
            "same command with a larger --max-rejected to resume."
        )


def _reasons(counts: Sequence[SourceCounts]) -> Counter[str]:
    """Count the rejected lines by reason."""
    reasons: Counter[str] = Counter()
    for source_counts in counts:
        reasons.update(source_counts.rejected)
    return reasons


def parse_share(text: str) -> float:
    """Parse a share such as ``5%`` or ``0.05``, for argparse."""
    match = re.fullmatch(r"([\d.]+)(%?)", text)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1 or text == "1":
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, found {text}")
    return value
