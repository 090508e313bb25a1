"""User, run and data errors, exit codes, and helpers for error messages."""

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

    Entry points print the message without a traceback and exit with code 2. A message names the
    file and line or the field, the value found, the value expected, and how to fix it.
    """


class RunError(RuntimeError):
    """A failure known to all ranks: the first rank prints it, and the exit code is 1."""


class DataError(Exception):
    """An error in a dataset, known only to the rank that read it.

    That rank prints it, and the exit code is 2, as for :class:`UserError`. torch's data workers
    re-raise an exception with its traceback as the message; only the last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("DataError: ")[2].strip())


class ErrorCollector:
    """Collector of user errors, to report all of them together."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Record a :class:`UserError` raised by the body."""
        try:
            yield
        except UserError as error:
            self.lines.append(str(error))

    def report(self) -> None:
        """Raise the recorded errors as one; duplicate lines are reported once.

        Raises:
            UserError: an error was recorded.
        """
        if self.lines:
            lines = (line for text in self.lines for line in text.splitlines())
            raise UserError("\n".join(dict.fromkeys(lines)))


def did_you_mean(name: str, possible: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the possible name closest to ``name``, or nothing.

    Leading dashes are ignored, since all flags share them.
    """
    names = {other.lstrip("-"): other for other in possible}
    near = difflib.get_close_matches(name.lstrip("-"), names, n=1, cutoff=0.75)
    return f"; did you mean '{names[near[0]]}'?" if near else ""


def download_hint(path: Path) -> str:
    """Return a download command for a path that looks like a Hugging Face Hub name, or nothing."""
    name = str(path)
    if path.exists() or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is None:
        return ""
    return (
        ". If it is a Hugging Face Hub repository, download it first with "
        f"`hf download {name} --local-dir {path.name}`, and pass {path.name}"
    )
