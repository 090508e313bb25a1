"""Reading of the original lines of documents from the input files of ``preprocess_data``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.document_sources.lookup import Origin, resolve_file
from data_tools.preprocess.encoding.encode import read_range
from data_tools.preprocess.input.blocks import Block, FileRange, LongLine, TableRows, read_blocks
from data_tools.preprocess.input.compression import HEAD_BYTES, find_opener
from data_tools.preprocess.input.sources import STDIN, InputSource, find_input
from megatron_llmjp.errors import UserError

NO_LIMIT = 1 << 62


def read_original_lines(
    origins: Sequence[Origin], root: Path | None = None
) -> list[bytes | UserError]:
    """Return the line of each document without its newline; a row of a table as JSON.

    A compressed file is decompressed once, up to the last line that is needed.

    Args:
        origins: the documents.
        root: folder of the files, if they have moved.

    Returns:
        A line, or the reason why it cannot be read, for each document.
    """
    found: dict[int, bytes | UserError] = {}
    by_file: dict[str, list[int]] = {}
    for at, origin in enumerate(origins):
        by_file.setdefault(json.dumps(origin.file, sort_keys=True), []).append(at)
    for numbers in by_file.values():
        numbers.sort(key=lambda at: _start(origins[at]))
        try:
            source = _open_source(origins[numbers[0]], root)
            lines = _lines(source, [_start(origins[at]) for at in numbers])
            found |= dict(zip(numbers, lines, strict=True))
        except (UserError, OSError) as error:
            reason = error if isinstance(error, UserError) else UserError(str(error))
            found |= {at: reason for at in numbers if at not in found}
    return [found[at] for at in range(len(origins))]


def _start(origin: Origin) -> int:
    """Return the place from which a source is read: an offset, or a row of a table."""
    return origin.line if origin.offset is None else origin.offset


def _open_source(origin: Origin, root: Path | None) -> InputSource:
    """Return the file of a document, or the part of it that its offset counts from.

    Raises:
        UserError: it is missing, cannot be read again, or has changed.
    """
    recorded = origin.file
    if "dataset" in recorded or recorded.get("name") == STDIN:
        raise UserError("the document was not read from a file")
    name = resolve_file(str(recorded["name"]), root)
    if root is None and "://" not in name and not Path(name).is_file():
        raise UserError(f"{name}: no such file; if it has moved, give its folder by --source-root")
    (source,) = find_input([name]).sources
    if "bytes" in recorded and recorded.get("first_offset") is None:
        source = replace(source, start=recorded["bytes"][0], end=recorded["bytes"][1])
    now = source.identity()
    if any(now[key] != recorded.get(key) for key in ("size", "content")):
        raise UserError(f"{name}: the file has changed since preprocess_data read it")
    return source


def _lines(source: InputSource, starts: Sequence[int]) -> Iterator[bytes]:
    """Yield the line or row at each of ascending positions."""
    is_stream = source.remote is None and _is_compressed(source)
    blocks: Iterator[Block] = iter(())
    block: Block | None = None
    for start in starts:
        while block is None or not block.end > start >= _first(block):
            if block is None or not is_stream:
                blocks = read_blocks(source, start, None, NO_LIMIT)
            block = next(blocks, None)
            if block is None:
                raise UserError(f"{source.name}: has no text at {start:,}")
        yield _line(block, start - _first(block))


def _is_compressed(source: InputSource) -> bool:
    head = source.read_head(HEAD_BYTES)
    return not head.startswith(b"PAR1") and find_opener(source, head) is not None


def _first(block: Block) -> int:
    if isinstance(block.payload, TableRows):
        return block.end - block.payload.count
    return block.end - block.size


def _line(block: Block, start: int) -> bytes:
    payload = block.payload
    if isinstance(payload, TableRows):
        row = {name: column[start] for name, column in payload.columns.items()}
        return json.dumps(row, ensure_ascii=False, default=str).encode(errors="surrogatepass")
    assert not isinstance(payload, LongLine)  # there is no limit
    if isinstance(payload, FileRange):
        payload = read_range(payload)
    end = payload.find(b"\n", start)
    return payload[start:] if end < 0 else payload[start:end]
