"""A run's command line, read for its data alone by the programs that plan and index it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_llmjp.config.command_line import parse, print_notes
from megatron_llmjp.config.load import Layers
from megatron_llmjp.config.schema import Config

_NO_MODEL = {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1}
"""A configuration has a model; nothing here looks at it."""


def add_data_flags(add: Callable[..., Any]) -> None:
    """Describe the flags that such a program is most often given; it takes all of a run's."""
    add("--fold-file", metavar="FILE", help="the folds (docs/folds.md)")
    add("--seq-length", metavar="N", help="tokens per sample")
    add("--global-batch-size", metavar="N", help="samples per iteration")


def parse_run_flags(flags: list[str], program: str) -> tuple[Config, Layers]:
    """Read a run's flags, of which those on the model may be left out, and print notes on them.

    Raises:
        UserError: as for the run itself.
    """
    layers = Layers()
    for name, value in _NO_MODEL.items():
        layers.set(name, value, program)
    config, _, notes = parse(flags, layers)
    print_notes(notes)
    return config, layers
