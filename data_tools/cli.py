"""What the command line programs share: teaching flags, errors without tracebacks, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import NoReturn

from megatron_llmjp.config.megatron import with_dashes
from megatron_llmjp.errors import EXIT_FAILURE, EXIT_USER_ERROR, DataError, UserError, suggest

EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, exit code 2, and the nearest flag for a mistyped one."""

    def __init__(self, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # an abbreviation may mean another flag tomorrow
        )

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse the command line; an unknown flag is answered with the nearest known one."""
        given = with_dashes(sys.argv[1:] if argv is None else argv)
        known = self._option_string_actions
        for word in given:
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in known:
                self.error(f"unknown flag {flag}{suggest(flag, known)}")
        return self.parse_args(given)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks of the texts and shows defaults where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS, []) or "default" in text:
            return text
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        return f"{text} (default: {shown})"


def run(program: str, body: Callable[[], int]) -> int:
    """Run a program's body and turn what may go wrong into a message and an exit code."""
    try:
        return body()
    except (DataError, UserError) as error:
        return _say(f"{program}: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        hint = " The same command goes on from here." if program == "preprocess_data" else ""
        return _say(f"\n{program}: interrupted; nothing unfinished under a final name.{hint}", 130)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except BrokenProcessPool:
        return _say(
            f"{program}: a worker process was killed, most likely for memory. Use fewer --workers "
            "or a smaller --max-line-mb; the same command goes on from the last saved point.",
            EXIT_FAILURE,
        )
    except OSError as error:
        return _say(f"{program}: {_explain(error)}", EXIT_USER_ERROR)


def _explain(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    remedies = {
        errno.ENOSPC: "Free some space; the same command then goes on.",
        errno.EDQUOT: "The quota is used up: free some space; the same command then goes on.",
        errno.EACCES: "Check the permissions, or choose another folder.",
        errno.EROFS: "Choose a folder that can be written to.",
    }
    return f"{where}{error.strerror or error}. {remedies.get(error.errno or 0, '')}".rstrip()


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


def cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def positive(text: str) -> int:
    """Parse a whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
