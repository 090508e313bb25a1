"""A run's command line, read for its data alone by the programs that plan and index it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from data_tools.common import ToolParser
from megatron_llmjp.arguments import normalize_dashes
from megatron_llmjp.config.flags import Command, parse, print_notes
from megatron_llmjp.config.loading import ConfigLayers

_NO_MODEL = {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1}
"""A configuration has a model; nothing here looks at it."""


def add_data_flags(add: Callable[..., Any]) -> None:
    """Describe the flags that such a program is most often given; it takes all of a run's."""
    add("--fold-file", metavar="FILE", help="the folds (docs/folds.md)")
    add("--seq-length", metavar="N", help="tokens per sample")
    add("--global-batch-size", metavar="N", help="samples per iteration")


def split_flags(
    parser: ToolParser, argv: Sequence[str] | None, add_own: Callable[[Callable[..., Any]], None]
) -> tuple[argparse.Namespace, list[str]]:
    """Separate a program's own flags from those of the run.

    Args:
        parser: describes the program, for ``--help``; ``add_own``'s flags are added to it.
        argv: the words after the program's name; those of this process if None.
        add_own: adds the program's own flags with an ``add_argument``.

    Returns:
        The program's own arguments, and the words that are the run's.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.error = parser.error  # type: ignore[method-assign]
    own.add_argument("-h", "--help", action="store_true")
    for add in (parser.add_argument, own.add_argument):
        add_own(add)
    args, words = own.parse_known_args(normalize_dashes(sys.argv[1:] if argv is None else argv))
    if args.help:
        parser.parse_args(["--help"])
    return args, words


def parse_run_flags(flags: list[str], program: str) -> Command:
    """Read a run's flags, of which those on the model may be left out, and print notes on them.

    The mode that they select is not looked at: a run's command line can be pasted with it.

    Raises:
        UserError: as for the run itself.
    """
    layers = ConfigLayers()
    for name, value in _NO_MODEL.items():
        layers.set(name, value, program)
    command = parse(flags, layers)
    print_notes(command.notes)
    return command
