"""An even, reproducible sample of the text of a corpus."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from data_tools.preprocess.blocks import FileRange, LongLine, TableRows, read_blocks
from data_tools.preprocess.encode import BadLine, parse_line, read_range, texts_of
from data_tools.preprocess.sources import STDIN, InputSource, has_suffix

LONGEST_LINE = 1 << 20


def sample_texts(sources: list[InputSource], keys: list[str], most: int) -> list[str]:
    """Return texts of the sources, of about ``most`` bytes in all if they have more.

    Which texts are taken depends on nothing but the texts: each is drawn by its checksum, and
    the share taken shrinks as they come. Bad lines are passed over; preprocess_data names them.
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
        if total > most:
            share = share * 3 // 4
            kept = [pair for pair in kept if pair[0] < share]
            total = sum(len(text.encode()) for _, text in kept)
    return [text for _, text in kept]


def first_texts(sources: list[InputSource], keys: list[str], most: int) -> list[str]:
    """Return the first texts of the sources, of about ``most`` bytes in all."""
    texts, total = [], 0
    for text in _texts(sources, keys):
        texts.append(text)
        total += len(text.encode())
        if total >= most:
            break
    return texts


def _texts(sources: list[InputSource], keys: list[str]) -> Iterator[str]:
    for source in sources:
        is_json = source.name == STDIN or has_suffix(source.name)
        for block in read_blocks(source, 0, keys, LONGEST_LINE):
            payload = block.payload
            if isinstance(payload, LongLine):
                continue
            if isinstance(payload, TableRows):
                for key in keys:
                    yield from (text for text in payload.columns[key] if isinstance(text, str))
                continue
            data = read_range(payload) if isinstance(payload, FileRange) else payload
            for line in data.splitlines():
                if line.strip():
                    yield from _of_line(line, keys if is_json else None)


def _of_line(line: bytes, keys: list[str] | None) -> list[str]:
    if keys is None:
        return [line.decode(errors="ignore")]
    try:
        record = parse_line(line)
        return [text for key in keys for text in texts_of(record, key) if _is_utf8(text)]
    except BadLine:
        return []


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False
