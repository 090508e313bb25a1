"""Where input files can be cut, and how much text they contain per byte on disk.

Plain files are cut between lines, compressed files at the starts of their streams, Parquet files
between row groups.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.preprocess.input.compression import HEAD_BYTES, find_opener
from data_tools.preprocess.input.remote.reading import read_heads
from data_tools.preprocess.input.sources import COMPRESSED_SUFFIXES, InputSource
from data_tools.preprocess.input.stream_codecs import find_codec
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import evenly_spaced_offsets

SEARCH_BYTES = 8 << 20
"""A compressed file is cut if a second stream starts within these first bytes."""
SAMPLED_FILES = 8
SAMPLED_TEXT = 1 << 20
"""Files of each format that are sampled, and bytes of text of each, for the density."""
PERCENT_OF_PLAIN = 100


def why_not_cut(source: InputSource, cut_streams: bool = True) -> str:
    """Return why a file cannot be cut, or "" if it can.

    Args:
        source: the file.
        cut_streams: whether compressed files may be cut.
    """
    if source.remote is not None and not source.remote.has_ranges:
        return "the server ignores byte ranges"
    head = source.read_head(HEAD_BYTES)
    is_table = head.startswith(b"PAR1")
    if not is_table and find_opener(source, head) is None:
        return ""
    if source.remote is not None:
        return f"a remote {'Parquet' if is_table else 'compressed'} file"
    if is_table:
        return "" if _row_groups(source) > 1 else "a Parquet file with one row group"
    if not cut_streams:
        return "compressed; with --shuffle-seed or --remove-duplicates only plain files are cut"
    with Path(source.name).open("rb") as file:
        codec = find_codec(head, source.name)
        if codec is None:
            return "compressed in a format without independent streams"
        if codec.skip_padding(file, 0):  # frames without text, as before each frame of pzstd
            return ""
        found = codec.next_stream(file, 1, min(SEARCH_BYTES, source.size))
        return "" if found is not None else f"one {codec.name} stream"


def read_remote_heads(sources: Sequence[InputSource]) -> None:
    """Read what :func:`why_not_cut` needs of all remote files at the same time."""
    files = [source.remote for source in sources if source.remote is not None]
    read_heads([file for file in files if file.has_ranges], HEAD_BYTES)


def _row_groups(source: InputSource) -> int:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:  # reported when the file is read
        return 1
    try:
        return int(pq.read_metadata(source.name).num_row_groups)
    except (pyarrow.ArrowException, OSError):  # reported when the file is read
        return 1


def row_groups_of_part(source: InputSource, metadata: Any) -> range:
    """Return the row groups of a part of a Parquet file: those that begin in its bytes.

    A group begins where the groups before it end, if the groups are stored in their order.
    """
    if source.end is None:
        return range(metadata.num_row_groups)
    begin, first, end = 0, None, 0
    for group in range(metadata.num_row_groups):
        if source.start <= begin < source.end:
            first = group if first is None else first
            end = group + 1
        of_group = metadata.row_group(group)
        begin += sum(
            of_group.column(at).total_compressed_size for at in range(of_group.num_columns)
        )
    return range(end if first is None else first, end)


def text_percentages(sources: Sequence[InputSource], keys: Sequence[str]) -> list[int]:
    """Return the bytes of text per 100 bytes on disk of each source, estimated by its suffix.

    Only the ratio between formats matters: 100 for all if there is one format.
    """
    kinds = [_suffix(source.name) for source in sources]
    if len(set(kinds)) <= 1:
        return [PERCENT_OF_PLAIN] * len(sources)
    by_kind = {
        kind: [source for source, its in zip(sources, kinds, strict=True) if its == kind]
        for kind in set(kinds)
    }
    percent = {kind: _sampled_percentage(files, keys) for kind, files in by_kind.items()}
    return [percent[kind] for kind in kinds]


def _suffix(name: str) -> str:
    """Return the suffix of a compressed or Parquet file, "" for others."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix == ".parquet" or suffix in COMPRESSED_SUFFIXES[1:] else ""


def _sampled_percentage(files: Sequence[InputSource], keys: Sequence[str]) -> int:
    """Return the median percentage of some files, evenly spread over the list."""
    files = [source for source in files if source.size]
    chosen = [files[at] for at in evenly_spaced_offsets(len(files), 1, SAMPLED_FILES)][: len(files)]
    found = [percent for source in chosen if (percent := _percentage(source, keys))]
    return max(round(statistics.median(found)), 1) if found else PERCENT_OF_PLAIN


def _percentage(source: InputSource, keys: Sequence[str]) -> int:
    """Return the percentage of one file; 0 if it is unknown: the file is remote or damaged."""
    if source.remote is not None:
        return 0
    with Path(source.name).open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        if head.startswith(b"PAR1"):
            return _parquet_percentage(source, keys)
        try:
            opener = find_opener(source, head)
            if opener is None:
                return PERCENT_OF_PLAIN
            return _stream_percentage(opener(file), file, source.size)
        except (UserError, EOFError, ValueError, ImportError):
            return 0
        except Exception as error:  # each decompressor has its own; reported when the file is read
            if isinstance(error, OSError) and error.errno is not None:
                raise
            return 0


def _stream_percentage(stream: Any, file: BinaryIO, size: int) -> int:
    """Return the percentage of the first text of a compressed file."""
    text = 0
    while text < SAMPLED_TEXT and (data := stream.read(1 << 16)):
        text += len(data)
    return text * 100 // max(min(file.tell(), size), 1)


def _parquet_percentage(source: InputSource, keys: Iterable[str]) -> int:
    """Return the percentage of a Parquet file, from the sizes of the columns in its footer."""
    try:
        import pyarrow
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(source.name)
    except (ImportError, pyarrow.ArrowException, OSError):
        return 0
    wanted, text = set(keys), 0
    for group in range(metadata.num_row_groups):
        for at in range(metadata.num_columns):
            column = metadata.row_group(group).column(at)
            if column.path_in_schema.partition(".")[0] in wanted:
                text += column.total_uncompressed_size
    return text * 100 // source.size
