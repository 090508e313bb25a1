"""Descriptions of the input files in a file of document sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_tools.preprocess.input.compression import HEAD_BYTES, find_opener
from data_tools.preprocess.input.sources import InputSource


def describe_files(sources: Sequence[InputSource]) -> list[dict[str, Any]]:
    """Return name, size and checksum of each input file.

    Of a part of a file also ``bytes``, its range, and ``first_line`` and ``first_offset``: the
    place in the file from which the documents' lines and offsets are counted, None if unknown.
    """
    return [_describe(source) for source in sources]


def _describe(source: InputSource) -> dict[str, Any]:
    found = source.identity()
    if source.end is None:
        return found
    head = source.read_head(HEAD_BYTES) if source.remote is None else b""
    is_table = head.startswith(b"PAR1")  # rows are counted from the start of the file
    is_first = source.start == 0
    is_compressed = not is_table and find_opener(source, head) is not None
    return found | {
        "first_line": 0 if is_table or is_first else None,
        "first_offset": 0 if is_first or not is_compressed else None,
    }
