"""Parsing of command-line arguments, shared by all programs: flags, numbers, sizes, shards."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, NoReturn

from megatron_llmjp.completion import add_completion_flag
from megatron_llmjp.errors import UserError, did_you_mean
from megatron_llmjp.versions import add_version_flag

MAX_COUNT = 2**63
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SIZE_UNITS = ("", "K", "M", "G", "T")


class CommandLineParser(argparse.ArgumentParser):
    """argparse with one-line errors and a suggestion for each misspelt flag.

    Flags may be written with underscores, and are not abbreviated: an abbreviation could become
    ambiguous when a flag is added.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        add_version_flag(self)
        add_completion_flag(self)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a :class:`UserError`."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line, or the words after the program's name.

        Raises:
            UserError: an argument is unknown, missing or invalid.
        """
        words = normalize_dashes(sys.argv[1:] if argv is None else argv)
        known = self._option_string_actions
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in known:
                self.error(f"unknown flag {flag}{did_you_mean(flag, known)}")
        return self.parse_args(words)


def normalize_dashes(argv: Iterable[str]) -> list[str]:
    """Return the arguments with ``--some_flag=x_y`` written as ``--some-flag=x_y``."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            word = flag.replace("_", "-") + equals + value
        words.append(word)
    return words


def positive_int(text: str) -> int:
    """Parse a positive integer, as an argparse type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def parse_size(text: str, default_unit: str = "") -> float:
    """Parse a size in bytes: ``500MB``, ``5G`` (powers of 1000) or ``80GiB`` (powers of 1024).

    Args:
        text: the size.
        default_unit: unit of a number without one: K, M, G or T; bytes when empty.

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)", text.strip(), re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"expected a size such as 500MB, 5GB or 80GiB, found '{text}'")
    number, unit, binary, suffix = match.groups()
    power = _SIZE_UNITS.index(unit.upper() or ("" if suffix else default_unit))
    return float(float(number) * (1024 if binary else 1000) ** power)


def parse_count(text: Any) -> Any:
    """Parse a count: ``27600000000``, ``27.6B`` or ``1e9``; K, M, B and T are powers of 1000.

    Values that are not text are returned unchanged.

    Raises:
        ValueError: it is not a count.
    """
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"\s*(\d[\d_]*\.?\d*(?:[eE][+]?\d{1,2})?)\s*([KMBT]?)\s*", text, re.I)
    if match is None:
        raise ValueError(f"expected a number such as 27600000000, 27.6B or 1e9, found '{text}'")
    count = round(Decimal(match[1].replace("_", "")) * _COUNT_UNITS[match[2].upper()])
    if count >= MAX_COUNT:
        raise ValueError(f"expected a number below 2^63, found '{text[:50]}'")
    return count


def parse_shard(text: str) -> tuple[int, int]:
    """Parse ``--shard`` into the number of this task and the number of tasks.

    ``3/16`` is task 3 of 0 to 15. ``slurm/16`` takes the task number from the Slurm array; the
    number of tasks is explicit because Slurm's is wrong when only some tasks are resubmitted.

    Raises:
        UserError: the value is invalid, or there is no Slurm array.
    """
    match = re.fullmatch(r"(\d+|slurm)/(\d+)", text)
    if not match:
        raise UserError(f"--shard {text}: expected NUMBER/COUNT such as 0/16, or slurm/16")
    task = os.environ.get("SLURM_ARRAY_TASK_ID") if match[1] == "slurm" else match[1]
    if task is None:
        raise UserError(
            f"--shard {text}: SLURM_ARRAY_TASK_ID is not set; submit with sbatch --array="
            f"0-{int(match[2]) - 1}, or give --shard NUMBER/{match[2]}"
        )
    number, count = int(task), int(match[2])
    if not 0 <= number < count <= 99999:
        raise UserError(f"--shard {text}: task {number} is outside 0 to {count - 1}")
    return number, count
