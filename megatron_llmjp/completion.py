"""Completion of the programs' flags, file names and choices in bash, zsh and fish, by shtab."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_llmjp.errors import UserError

SHELLS = ("bash", "zsh", "fish")
COMPLETION_FLAG = "--print-completion"
"""Hidden flag of all programs, used by ``shell_completion``."""

_FOLDERS = ("DIR", "SAVE")
_FILES = ("FILE", "PATH", "PREFIX", "PRESET|FILE", "INPUT")
_CHOICES = re.compile(r"[\w.-]+(?:\|[\w.-]+)+")


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a program.

    Args:
        parser: the parser of the program.
        shell: one of :data:`SHELLS`.

    Raises:
        UserError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs shtab: pip install shtab") from error
    # Choices set below would be checked when the program's own parser is used again.
    parser = copy.deepcopy(parser)
    for action in parser._actions:
        metavar = action.metavar
        if metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif metavar in _FILES or action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif isinstance(metavar, str) and not action.choices and _CHOICES.fullmatch(metavar):
            action.choices = metavar.split("|")
    parser.prog = parser.prog.removesuffix(".py")
    script: str = shtab.complete(parser, shell=shell)
    return script


class CompletionAction(argparse.Action):
    """:data:`COMPLETION_FLAG`: print the completion script for a shell and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            choices=SHELLS,
            help=argparse.SUPPRESS,
            **options,
        )

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, flag: Any = None
    ) -> NoReturn:
        """Print the script and exit with code 0."""
        print(completion_script(parser, values))
        parser.exit()


def add_completion_flag(parser: argparse.ArgumentParser) -> None:
    """Add the hidden :data:`COMPLETION_FLAG`."""
    parser.add_argument(COMPLETION_FLAG, action=CompletionAction)
