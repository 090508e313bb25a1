"""Flags of pretrain_gpt.py for programs that use only a run's data settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from data_tools.common import ToolParser
from megatron_llmjp.arguments import normalize_dashes
from megatron_llmjp.completion import COMPLETION_FLAG, SHELLS
from megatron_llmjp.config.flags import Command, parse, print_notes
from megatron_llmjp.config.loading import ConfigLayers

_PLACEHOLDER_MODEL = {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1}
"""A configuration requires a model, which these programs do not use."""


def add_data_flags(add: Callable[..., Any]) -> None:
    """Document the most common flags; all flags of a run are accepted."""
    add("--fold-file", metavar="FILE", help="fold file (docs/folds.md)")
    add("--seq-length", metavar="N", help="tokens per sample")
    add("--global-batch-size", metavar="N", help="samples per iteration")


def split_flags(
    parser: ToolParser, argv: Sequence[str] | None, add_own: Callable[[Callable[..., Any]], None]
) -> tuple[argparse.Namespace, list[str]]:
    """Separate a program's own flags from those of the run.

    Args:
        parser: describes the program, for ``--help``; ``add_own``'s flags are added to it.
        argv: command-line arguments; those of this process if None.
        add_own: adds the program's own flags through an ``add_argument``.

    Returns:
        The program's own arguments, and the remaining ones, which are the run's.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.error = parser.error  # type: ignore[method-assign]
    own.add_argument("-h", "--help", action="store_true")
    own.add_argument("--version", action="store_true")
    own.add_argument(COMPLETION_FLAG, choices=SHELLS, dest="shell")
    for add in (parser.add_argument, own.add_argument):
        add_own(add)
    args, words = own.parse_known_args(normalize_dashes(sys.argv[1:] if argv is None else argv))
    for flag in ("--help", "--version"):
        if getattr(args, flag[2:]):
            parser.parse_args([flag])
    if args.shell is not None:
        parser.parse_args([COMPLETION_FLAG, args.shell])
    return args, words


def parse_run_flags(flags: list[str], program: str) -> Command:
    """Parse a run's flags, of which those of the model are optional, and print notes on them.

    A mode such as ``--dry-run`` is ignored, so that a run's command line can be used unchanged.

    Raises:
        UserError: the flags are invalid, as for the run itself.
    """
    layers = ConfigLayers()
    for name, value in _PLACEHOLDER_MODEL.items():
        layers.set(name, value, program)
    command = parse(flags, layers)
    print_notes(command.notes)
    return command
