"""Errors that are the user's to mend: shown as one message, without a traceback."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 3
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake in a flag, a configuration, a data file or a checkpoint.

    Entry points print the message and exit with code 2. A message names the file and line or
    field, what was found, what was expected, and how to mend it.
    """


class RunError(RuntimeError):
    """A run cannot go on. All ranks know it; the first one tells, and the exit code is 1."""


class DataError(Exception):
    """What is wrong with a dataset that only the rank knows which read it.

    That rank tells, and the exit code is 2, as with :class:`UserError`. torch's data workers pass
    an exception on with its traceback for a message, of which the last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("DataError: ")[2].strip())


class ErrorCollector:
    """User errors that are collected, so that all of them are reported together."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Record a :class:`UserError` of the body, which ends there."""
        try:
            yield
        except UserError as error:
            self.lines.append(str(error))

    def report(self) -> None:
        """Raise what was recorded as one error; the same line is reported once.

        Raises:
            UserError: anything was recorded.
        """
        if self.lines:
            lines = (line for text in self.lines for line in text.splitlines())
            raise UserError("\n".join(dict.fromkeys(lines)))


def did_you_mean(name: str, possible: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the possible name nearest to ``name``, or nothing.

    Dashes in front do not count: all flags share them.
    """
    names = {other.lstrip("-"): other for other in possible}
    near = difflib.get_close_matches(name.lstrip("-"), names, n=1, cutoff=0.75)
    return f"; did you mean '{names[near[0]]}'?" if near else ""


def download_hint(path: Path) -> str:
    """Return how to download what looks like a name on the Hugging Face Hub, or nothing."""
    name = str(path)
    if path.exists() or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is None:
        return ""
    return (
        ". If it is a repository of the Hugging Face Hub, download it first, with "
        f"`hf download {name} --local-dir {path.name}`, and give {path.name}"
    )
