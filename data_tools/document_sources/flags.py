"""Flags of ``preprocess_data`` on the sources of documents."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_llmjp.errors import UserError


def add_source_flags(add: Callable[..., Any]) -> None:
    """Add the flags on the sources of documents."""
    add(
        "--record-sources",
        action="store_true",
        help="write file, line and byte offset of each document to PREFIX_KEY_document.sources, "
        "from which inspect_dataset --run prints the sources of a global batch",
    )
    add(
        "--id-key",
        metavar="KEY",
        help="with --record-sources: also write the document's own id, the string or integer of "
        "this JSON key, such as id or meta.id",
    )


def check_source_flags(args: argparse.Namespace) -> None:
    """Raise UserError if an id is requested without sources."""
    if args.id_key is not None and not args.record_sources:
        raise UserError(f"--id-key {args.id_key} requires --record-sources")
