"""Removal of documents on request: the reasons they are counted under, and limits on their length.

Removed documents are not errors: they do not count towards ``--max-rejected``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.statistics.removed import REASONS
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.errors import UserError

FILTERED, TOO_SHORT, TOO_LONG, DUPLICATES = REASONS


class RemovedDocument(Exception):
    """A document that is removed, with the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class LengthLimits:
    """Limits on the length of a document; longer and shorter ones are removed.

    The length is that of the texts of all JSON keys together. Tokens include EOD and BOS tokens.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None

    @property
    def on_characters(self) -> bool:
        """Whether the number of characters is limited."""
        return self.min_characters is not None or self.max_characters is not None

    @property
    def on_tokens(self) -> bool:
        """Whether the number of tokens is limited."""
        return self.min_tokens is not None or self.max_tokens is not None

    def identity(self) -> dict[str, int]:
        """Return the limits that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def check_characters(self, texts: Iterable[str]) -> None:
        """Check the number of characters (Unicode code points) of a document.

        Raises:
            RemovedDocument: it is too short or too long.
        """
        length = sum(map(len, texts))
        if self.min_characters is not None and length < self.min_characters:
            raise RemovedDocument(TOO_SHORT)
        if self.max_characters is not None and length > self.max_characters:
            raise RemovedDocument(TOO_LONG)

    def check_tokens(
        self, lengths: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.bool_], dict[str, int]]:
        """Return which documents to keep, and the number of others by reason.

        Args:
            lengths: tokens of each document.
        """
        most = np.iinfo(np.int64).max
        short = lengths < (self.min_tokens or 0)
        long = lengths > (most if self.max_tokens is None else self.max_tokens)
        removed = {TOO_SHORT: int(short.sum()), TOO_LONG: int((long & ~short).sum())}
        return ~(short | long), {reason: count for reason, count in removed.items() if count}


def add_limit_flags(add: Callable[..., Any]) -> None:
    """Add the flags of the limits on the length of documents."""
    for unit, note in (("characters", ""), ("tokens", ", with EOD and BOS tokens")):
        for bound, other in (("min", "fewer"), ("max", "more")):
            add(
                f"--{bound}-{unit}",
                type=positive_int,
                metavar="N",
                help=f"remove documents with {other} than N {unit}{note}; they are counted, not "
                "cut",
            )


def length_limits(args: argparse.Namespace) -> LengthLimits:
    """Return the limits that the flags set.

    Raises:
        UserError: a minimum is above its maximum.
    """
    for unit in ("characters", "tokens"):
        least, most = getattr(args, f"min_{unit}"), getattr(args, f"max_{unit}")
        if least is not None and most is not None and least > most:
            raise UserError(
                f"--min-{unit} {least} is larger than --max-{unit} {most}: all documents would be "
                "removed"
            )
    return LengthLimits(args.min_characters, args.max_characters, args.min_tokens, args.max_tokens)


def removal_reasons(limits: LengthLimits, filters: bool, duplicates: bool) -> list[str]:
    """Return the reasons for which a job may remove documents."""
    wanted = {
        FILTERED: filters,
        TOO_SHORT: limits.min_characters is not None or limits.min_tokens is not None,
        TOO_LONG: limits.max_characters is not None or limits.max_tokens is not None,
        DUPLICATES: duplicates,
    }
    return [reason for reason in REASONS if wanted[reason]]


def add_removed(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Add numbers of removed documents by reason."""
    for reason, count in more.items():
        total[reason] = total.get(reason, 0) + count
