"""Common parts of the command-line programs: arguments, progress, errors and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NoReturn

from megatron_llmjp.arguments import CommandLineParser
from megatron_llmjp.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    DataError,
    UserError,
)
from megatron_llmjp.formatting import format_count

SECONDS_BETWEEN_LINES = 10.0


class EncodingProgress:
    """Counts documents, bytes and tokens, and displays them with their rates.

    On a terminal it is a progress bar, elsewhere one line every few seconds. MB are 10^6 bytes of
    decompressed input; percentage and remaining time are computed from bytes of the files on disk.
    """

    def __init__(
        self,
        total: int,
        done: int,
        log_interval: int | None,
        earlier_documents: int = 0,
        earlier_tokens: int = 0,
    ) -> None:
        """Start to measure.

        Args:
            total: bytes of all files on disk; 0 if unknown.
            done: bytes that earlier starts of a resumed job have read.
            log_interval: documents between two lines; None for a line every few seconds.
            earlier_documents: documents of earlier starts.
            earlier_tokens: tokens of earlier starts.
        """
        self.total, self.disk = total, done
        self._earlier = (earlier_documents, earlier_tokens)
        self.first_disk = done
        self.log_interval = log_interval
        self.documents = self.bytes = self.tokens = 0
        self._started = self._shown = time.monotonic()
        self._shown_documents = 0
        self._bar: Any = None
        self._terminal = sys.stderr.isatty()

    def update(self, documents: int, size: int, tokens: int, disk: int) -> None:
        """Add the counts of a block; ``disk`` is the position in all files on disk, in bytes."""
        self.documents += documents
        self.bytes += size
        self.tokens += tokens
        self.disk = disk
        if self._terminal:
            self._show_bar()
        elif self._due():
            print(self.line(), file=sys.stderr, flush=True)
            self._shown, self._shown_documents = time.monotonic(), self.documents

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def line(self) -> str:
        """Return a progress line that begins like Megatron-LM's."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rates = (
            f"{self.documents / seconds:,.0f} docs/s, {self.bytes / seconds / 1e6:.2f} MB/s, "
            f"{self.tokens / seconds / 1e6:.2f} M tokens/s"
        )
        documents, tokens = self._earlier[0] + self.documents, self._earlier[1] + self.tokens
        text = f"Processed {documents:,} documents ({rates}), {format_count(tokens)} tokens so far"
        if self.total:
            left = (self.total - self.disk) * seconds / max(self.disk - self.first_disk, 1)
            text += f", {self.disk / self.total:.1%}, {_clock(left)} left"
        return text

    def _due(self) -> bool:
        if self.log_interval is not None:
            return self.documents - self._shown_documents >= self.log_interval
        return time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES

    def _show_bar(self) -> None:
        if self._bar is None:
            from tqdm import tqdm  # imported late: its thread must not exist before workers fork

            self._bar = tqdm(
                total=self.total or None,
                initial=self.first_disk,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
                if self.total
                else "{desc} [{elapsed}]",
            )
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._bar.set_description_str(
            f"{self._earlier[0] + self.documents:,} docs, {self.documents / seconds:,.0f} docs/s, "
            f"{self.bytes / seconds / 1e6:.1f} MB/s, {self.tokens / seconds / 1e6:.2f} Mtok/s, "
            f"{format_count(self._earlier[1] + self.tokens)} tokens",
            refresh=False,
        )
        self._bar.update(self.disk - self._bar.n)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class ToolParser(CommandLineParser):
    """Parser of a data tool: reports an error in one line and exits with code 2."""

    def __init__(self, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks in texts, and shows meaningful defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS, []) or "default" in text:
            return text
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        return f"{text} (default: {shown})"


def run_tool(program: str, body: Callable[[], int]) -> int:
    """Run a program's body and convert its errors to a message and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in files may not be printable
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return body()
    except (DataError, UserError) as error:
        return _fail(f"{program}: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        hint = " Run the same command to resume." if program == "preprocess_data" else ""
        return _fail(
            f"\n{program}: interrupted; no incomplete output was left.{hint}", EXIT_INTERRUPTED
        )
    except BrokenPipeError:  # the reader of the output (head, less) has exited
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except BrokenProcessPool:
        return _fail(
            f"{program}: a worker process was killed, probably because it ran out of memory. Use "
            "fewer --workers or a smaller --max-line-mb; the same command resumes from the last "
            "saved point.",
            EXIT_FAILURE,
        )
    except OSError as error:
        return _fail(f"{program}: {_explain(error)}", EXIT_USER_ERROR)


def _explain(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    remedies = {
        errno.ENOSPC: "Free some space, then run the same command to resume.",
        errno.EDQUOT: "Disk quota exceeded: free some space, then run the same command to resume.",
        errno.EACCES: "Check the permissions, or choose another folder.",
        errno.EROFS: "Choose a writable folder.",
    }
    return f"{where}{error.strerror or error}. {remedies.get(error.errno or 0, '')}".rstrip()


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


def cores() -> int:
    """Return the number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
