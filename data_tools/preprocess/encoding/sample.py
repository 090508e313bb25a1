"""Reproducible sampling of the texts of a corpus."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

from data_tools.preprocess.encoding.encode import read_range
from data_tools.preprocess.input.blocks import FileRange, LongLine, TableRows, read_blocks
from data_tools.preprocess.input.json_lines import BadLine, parse_line, texts_of
from data_tools.preprocess.input.sources import STDIN, InputSource, has_suffix
from data_tools.preprocess.selection.document_hooks import DocumentHooks
from data_tools.preprocess.selection.removal import RemovedDocument

MAX_LINE_BYTES = 1 << 20


def sample_texts(sources: list[InputSource], keys: list[str], max_bytes: int) -> list[str]:
    """Return a random sample of the texts, of about ``max_bytes`` bytes in total.

    The sample depends only on the texts: each is drawn by its checksum, and the share drawn is
    reduced as texts are read. Invalid lines are skipped; preprocess_data reports them.
    """
    kept: list[tuple[int, str]] = []
    total, share = 0, 1 << 32
    for text in _texts(sources, keys):
        utf8 = text.encode()
        draw = zlib.crc32(utf8)
        if draw >= share:
            continue
        kept.append((draw, text))
        total += len(utf8)
        if total > max_bytes:
            share = share * 3 // 4
            kept = [pair for pair in kept if pair[0] < share]
            total = sum(len(text.encode()) for _, text in kept)
    return [text for _, text in kept]


def first_texts(
    sources: list[InputSource],
    keys: list[str],
    max_bytes: int,
    hooks: DocumentHooks | None = None,
) -> list[str]:
    """Return the first texts of the sources, of about ``max_bytes`` bytes in total.

    ``hooks`` select and change the documents before.
    """
    texts, total = [], 0
    for text in _texts(sources, keys, hooks):
        texts.append(text)
        total += len(text.encode())
        if total >= max_bytes:
            break
    return texts


def _texts(
    sources: list[InputSource], keys: list[str], hooks: DocumentHooks | None = None
) -> Iterator[str]:
    for source in sources:
        is_json = source.name == STDIN or has_suffix(source.name)
        for block in read_blocks(source, 0, keys if hooks is None else None, MAX_LINE_BYTES):
            payload = block.payload
            if isinstance(payload, LongLine):
                continue
            if isinstance(payload, TableRows) and hooks is not None:
                for at in range(payload.count):
                    row = {name: column[at] for name, column in payload.columns.items()}
                    yield from _texts_of_record(row, keys, hooks)
                continue
            if isinstance(payload, TableRows):
                for key in keys:
                    yield from (text for text in payload.columns[key] if isinstance(text, str))
                continue
            data = read_range(payload) if isinstance(payload, FileRange) else payload
            for line in data.splitlines():
                if line.strip():
                    yield from _texts_of_line(line, keys if is_json else None, hooks)


def _texts_of_line(line: bytes, keys: list[str] | None, hooks: DocumentHooks | None) -> list[str]:
    if keys is None:
        return [line.decode(errors="ignore")]
    try:
        return _texts_of_record(parse_line(line), keys, hooks)
    except BadLine:
        return []


def _texts_of_record(
    record: dict[str, Any], keys: list[str], hooks: DocumentHooks | None
) -> list[str]:
    """Return the texts of a document; none if it is removed or invalid."""
    try:
        record = record if hooks is None else hooks.apply(record)
        return [text for key in keys for text in texts_of(record, key) if _is_utf8(text)]
    except (BadLine, RemovedDocument):
        return []


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False
