"""Flags of ``convert_checkpoint`` for the form and the publication of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_hugging_face_flags(add: Callable[..., Any]) -> None:
    """Add the flags; ``add`` is the ``add_argument`` of a parser."""
    add(
        "--like",
        type=Path,
        metavar="DIR",
        help="Hugging Face model, or its config.json: to hf, write the same config.json, type and "
        "files of the weights, tokenizer and generation settings; the other flags take precedence. "
        "To the other formats, compare the model with it",
    )
    add(
        "--model-card",
        action="store_true",
        help="to hf: write README.md with the architecture, the training data and the settings of "
        "the run, and fields to fill for what is not recorded",
    )
    add(
        "--push-to-hub",
        metavar="REPO",
        help="to hf: upload the output, with a model card, to a private repository of the Hugging "
        "Face Hub, which is created if necessary (user/name, or name)",
    )
    add(
        "--public",
        action="store_true",
        help="with --push-to-hub: create a public repository, or use an existing one",
    )
