"""The typed result of a command line: what to do, with which configuration."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from megatron_llmjp.config.rehearsal import Rehearsal
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError


class Mode(Enum):
    """What ``pretrain_gpt.py`` does; the value is the flag that selects it."""

    TRAIN = ""
    DRY_RUN = "--dry-run"
    PLAN_DATA = "--plan-data"
    REHEARSE = "--rehearse"
    SUGGEST_LAYOUT = "--suggest-layout"


HELP: dict[Mode, str] = {
    Mode.DRY_RUN: "check everything, print the resolved configuration and exit",
    Mode.PLAN_DATA: "print the plan of the data (folds, tokens, epochs, learning rates) and exit",
    Mode.REHEARSE: "print layout, memory, traffic, time and warnings of a run of --world-size "
    "processes and exit; exit code 2 if it cannot run or does not fit",
    Mode.SUGGEST_LAYOUT: "search the layouts of the model on --world-size GPUs, print the best "
    "and exit; global batch and sequence length stay",
}
"""The modes that train nothing."""


class Command(NamedTuple):
    """A parsed command line. Nothing reads the words again after this."""

    config: Config
    """Validated; not yet resolved with data, tokenizer and checkpoint."""
    mode: Mode
    processes: int | None
    """Processes of the run: to start on this machine, or, where nothing is trained, of the run
    that is planned. None if no flag gives them."""
    rehearsal: Rehearsal | None
    """The machine of the run; only with :attr:`Mode.REHEARSE` and :attr:`Mode.SUGGEST_LAYOUT`."""
    config_name: str | None
    """The preset or file of ``--config``."""
    notes: tuple[str, ...]
    """One line for each flag that is accepted without effect."""
    origin: Mapping[str, str]
    """By field, the preset, file or flag that its value is from."""


def add_mode_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the modes that train nothing."""
    group = parser.add_argument_group("modes that train nothing")
    for mode, text in HELP.items():
        group.add_argument(mode.value, action="store_true", dest=mode.value, help=text)


def mode_of(arguments: Mapping[str, Any]) -> Mode:
    """The mode that parsed arguments select.

    Raises:
        UserError: they select more than one.
    """
    given = [mode for mode in HELP if arguments[mode.value]]
    if len(given) > 1:
        flags = " and ".join(mode.value for mode in given)
        raise UserError(f"{flags} exclude each other: give one of them")
    return given[0] if given else Mode.TRAIN
