"""Parsers of the console programs, and their arguments as rows of tables."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from tools.docs.reference.markdown import code, prose

ROOT = Path(__file__).resolve().parents[3]
COMMON = ("--help", "--version")
"""Flags of every program."""


def console_programs() -> dict[str, str]:
    """Return ``module:function`` of each program in pyproject.toml."""
    # tomllib is missing from Python 3.10.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.scripts]\n")[2].partition("\n[")[0]
    return dict(re.findall(r'^(\w+) = "([\w.:]+)"$', section, re.M))


def program_parser(program: str, target: str, *words: str) -> argparse.ArgumentParser:
    """Return the parser that a program prints the help of.

    Args:
        program: its name.
        target: ``module:function``.
        words: the arguments before ``--help``, such as a subcommand.
    """
    module, _, function = target.partition(":")
    main = getattr(importlib.import_module(module), function)
    # Not the environment: under Slurm, programs refuse or read it.
    environment = {name: os.environ.get(name, "") for name in ("PATH", "HOME")}
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.object(sys, "argv", [program, *words, "--help"]),
    ):
        return help_parser(main)


def help_parser(main: Callable[[], object]) -> argparse.ArgumentParser:
    """Return the parser whose help ``main`` prints, without printing it.

    Raises:
        ValueError: it prints no help.
    """
    found: list[argparse.ArgumentParser] = []

    def record(parser: argparse.ArgumentParser, file: object = None) -> None:
        found.append(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", record),
        contextlib.suppress(SystemExit),
    ):
        main()
    if not found:
        raise ValueError(f"{' '.join(sys.argv)} printed no help")
    return found[0]


def groups(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Yield each group of arguments that are neither hidden nor :data:`COMMON`, with its title."""
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and not {*COMMON} & {*action.option_strings}
        ]
        if actions:
            yield group.title or "", actions


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    """Return the argument with its values, and its help with its default."""
    formatter = parser._get_formatter()
    name = action.dest if not action.option_strings else action.dest.upper()
    values = "" if action.nargs == 0 else formatter._format_args(action, name)
    if not action.option_strings:
        names = code(values)
    else:
        *others, last = action.option_strings
        names = ", ".join([*map(code, others), code(f"{last} {values}".rstrip())])
    required = " (required)" if action.option_strings and action.required else ""
    effect = formatter._expand_help(action)
    if isinstance(action, argparse.BooleanOptionalAction):
        effect = effect.removesuffix(" (default: False)")  # which Python 3.10 appends
    return names, prose(effect) + required
