"""``inspect_dataset --summary``: print the summary of datasets, and write it to files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.find_datasets import find_datasets
from data_tools.statistics.card import format_card
from data_tools.statistics.summary import Summary, summarize
from data_tools.statistics.tables import format_csv, format_json, format_summary
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.filesystem import write_atomically


def _format_page(summary: Summary) -> str:
    from data_tools.statistics.page import format_page  # imported late: matplotlib takes a second

    return format_page(summary)


FORMATS: dict[str, Callable[[Summary], str]] = {
    ".csv": format_csv,
    ".json": format_json,
    ".md": format_card,
    ".html": _format_page,
}
"""Formats of ``--report``, by the ending of the file name."""


def add_flags(add: Callable[..., Any]) -> None:
    """Add the flags of ``--summary``."""
    add(
        "--summary",
        action="store_true",
        help="print documents, tokens, bytes and lengths of all datasets in folders or with "
        "prefixes, by dataset, language and source file; parts of --shard count as one dataset",
    )
    add(
        "--report",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="--summary: also write FILE.csv, FILE.json, a data card FILE.md, or a page with "
        "plots FILE.html; may be repeated",
    )


def print_summary(args: argparse.Namespace) -> int:
    """Print the summary of the given datasets, and write the requested files.

    Raises:
        UserError: a dataset cannot be read, or a file name has another ending.
    """
    for path in args.report:
        if path.suffix not in FORMATS:
            raise UserError(f"--report {path}: expected a file name ending in {', '.join(FORMATS)}")
        if not path.parent.is_dir():
            raise UserError(f"--report {path}: the folder {path.parent} does not exist")
    summary = summarize(find_datasets(args.prefixes))
    for path in args.report:  # before the output, whose reader may be gone
        write_atomically(path, FORMATS[path.suffix](summary), errors="backslashreplace")
        print(f"{path}: written", file=sys.stderr)
    for warning in summary.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(format_json(summary).rstrip() if args.json else format_summary(summary))
    return EXIT_DONE
