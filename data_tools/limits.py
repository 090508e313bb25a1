"""Limits on what a run may lose: a run that rejects its input, or finds none, is no success."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.journal import Tally
from megatron_llmjp.errors import UserError

ENOUGH_TO_JUDGE = 1000
"""Rejected lines after which a run is stopped early if most of its lines are rejected."""


@dataclass(frozen=True)
class Limits:
    """How much may be rejected, and whether a dataset without tokens is wanted.

    Attributes:
        max_rejected: largest share of rejected lines, among rejected lines and documents.
        allow_empty: whether a dataset without tokens is written.
    """

    max_rejected: float
    allow_empty: bool

    def check_early(self, tallies: Sequence[Tally]) -> None:
        """Stop a run that rejects most of its lines long before its end.

        Raises:
            UserError: more than half of the lines, and more than the limit, were rejected.
        """
        if _reasons(tallies).total() >= ENOUGH_TO_JUDGE:
            self._check_rejected(tallies, max(self.max_rejected, 0.5))

    def check(self, tallies: Sequence[Tally], keys: Sequence[str]) -> None:
        """Check a run that has read all of its input.

        Raises:
            UserError: too many lines were rejected, or a dataset would be without tokens.
        """
        self._check_rejected(tallies, self.max_rejected)
        empty = [key for key in keys if not sum(tally.tokens.get(key, 0) for tally in tallies)]
        if empty and not self.allow_empty:
            lines = sum(tally.lines for tally in tallies)
            rejected = _reasons(tallies).total()
            raise UserError(
                f"no tokens for --json-keys {' '.join(empty)}: {lines:,} lines were read, "
                f"{rejected:,} of them rejected. Check --input and --json-keys, or give "
                "--allow-empty to write an empty dataset."
            )

    def _check_rejected(self, tallies: Sequence[Tally], most: float) -> None:
        reasons = _reasons(tallies)
        rejected = reasons.total()
        total = rejected + sum(tally.documents for tally in tallies)
        if rejected <= most * total:
            return
        listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        raise UserError(
            f"{rejected:,} of {total:,} lines were rejected ({rejected / total:.1%}): {listed}. "
            f"--max-rejected is {self.max_rejected:.4%}. Fix the input or --json-keys, or give a "
            "larger --max-rejected: the same command then continues."
        )


def _reasons(tallies: Sequence[Tally]) -> Counter[str]:
    """Count the rejected lines by reason."""
    reasons: Counter[str] = Counter()
    for tally in tallies:
        reasons.update(tally.rejected)
    return reasons


def share(text: str) -> float:
    """Parse a share such as ``5%`` or ``0.05``, for argparse."""
    match = re.fullmatch(r"([\d.]+)(%?)", text)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1 or text == "1":
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, found {text}")
    return value
