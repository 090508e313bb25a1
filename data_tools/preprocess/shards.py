"""Sharding of the input over the tasks of a Slurm array, and lookup of the parts they wrote.

Each task takes consecutive files with about the same total size, so that concatenating the parts in
order gives the output of a single task. Large files of plain JSON lines are split between lines.
The assignment depends only on the list of files.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.documents import read_dataset_manifest
from data_tools.preprocess.compression import HEAD_BYTES, find_opener
from data_tools.preprocess.remote.reading import read_heads
from data_tools.preprocess.sources import InputSource
from megatron_llmjp.errors import UserError

MIN_SPLIT_BYTES = 64 * 1024 * 1024
"""Minimum size of a file of plain lines that is split between tasks."""
_PART_NAME = re.compile(r"_part(\d{5})of(\d{5})_(.+)_document")


def part_prefix(prefix: str, number: int, count: int) -> str:
    """Return the output prefix of one task."""
    return f"{prefix}_part{number:05}of{count:05}"


def take_shard(
    sources: list[InputSource], number: int, count: int
) -> tuple[list[InputSource], str]:
    """Return the sources of one task, and a checksum of the whole list.

    Raises:
        UserError: a source is a pipe, which cannot be sharded.
    """
    for source in sources:
        if not source.seekable:
            raise UserError(f"--shard: {source.name} is a pipe; sharding requires files")
    _read_remote_heads(sources)
    total, before, mine = sum(source.size for source in sources) or 1, 0, []
    for source in sources:
        middle = before + source.size / 2
        if _is_splittable(source):
            bounds = (total * at // count - before for at in (number, number + 1))
            start, end = (min(max(bound, 0), source.size) for bound in bounds)
            if start < end:
                mine.append(replace(source, start=start, end=end))
        elif min(int(middle * count / total), count - 1) == number:
            mine.append(source)
        before += source.size
    whole = "\n".join(f"{Path(source.name).name} {source.size}" for source in sources)
    return mine, f"{zlib.crc32(whole.encode()):08x}"


def _read_remote_heads(sources: list[InputSource]) -> None:
    """Read what :func:`_is_splittable` needs of all remote files at the same time."""
    large = [source.remote for source in sources if source.size >= MIN_SPLIT_BYTES]
    read_heads([file for file in large if file is not None and file.has_ranges], HEAD_BYTES)


def _is_splittable(source: InputSource) -> bool:
    """Return whether a file is large and consists of uncompressed lines."""
    if source.size < MIN_SPLIT_BYTES or (source.remote and not source.remote.has_ranges):
        return False
    head = source.read_head(HEAD_BYTES)
    return not head.startswith(b"PAR1") and find_opener(source, head) is None


def uneven_shards_warning(sources: list[InputSource], count: int) -> str:
    """Return a warning on files that are too large for one task but cannot be split, or ""."""
    _read_remote_heads(sources)
    share = sum(source.size for source in sources) / count
    large = [
        s for s in sources if s.size > 2 * max(share, MIN_SPLIT_BYTES) and not _is_splittable(s)
    ]
    if not large:
        return ""
    return (
        f"warning: {large[0].name} ({large[0].size:,} bytes) is larger than the shares of two "
        "tasks, but is read by one task: compressed files and Parquet files cannot be split. "
        "Divide it into several files, or decompress it."
        f"{f' This affects {len(large) - 1:,} more files.' if len(large) > 1 else ''}"
    )


def find_parts(prefix: str) -> dict[str, list[str]]:
    """Return the prefixes of all parts in order, by key.

    Raises:
        UserError: parts are missing, or belong to different arrays or input lists.
    """
    found: dict[tuple[str, int], dict[int, str]] = {}
    folder, name = Path(prefix).parent, Path(prefix).name
    for path in folder.glob("*.idx") if folder.is_dir() else ():
        match = _PART_NAME.fullmatch(path.stem[len(name) :])
        if match and path.stem.startswith(name):
            number, count, key = int(match[1]), int(match[2]), match[3]
            found.setdefault((key, count), {})[number] = str(path.with_suffix(""))
    if not found:
        raise UserError(f"--parts {prefix}: no file {prefix}_part*of*_*_document.idx")
    parts: dict[str, list[str]] = {}
    for (key, count), by_number in sorted(found.items()):
        if key in parts:
            raise UserError(
                f"--parts {prefix}: found parts of two arrays, of {len(parts[key])} and of "
                f"{count} tasks. Remove those of one array."
            )
        if missing := [n for n in range(count) if n not in by_number]:
            raise UserError(
                f"--parts {prefix}: {len(missing)} of {count} parts are missing for key '{key}': "
                f"{' '.join(map(str, missing[:50]))}. Submit them again: sbatch --array="
                f"{','.join(map(str, missing[:50]))} slurm/preprocess_data.sh --shard "
                f"slurm/{count} and the other arguments as before"
            )
        parts[key] = [by_number[number] for number in range(count)]
        _check_input_lists(parts[key])
    return parts


def _check_input_lists(prefixes: list[str]) -> None:
    lists: dict[Any, str] = {}
    for prefix in prefixes:
        recipe = (read_dataset_manifest(prefix) or {}).get("recipe", {})
        lists.setdefault(recipe.get("shard", {}).get("list"), prefix)
    if len(lists) > 1:
        raise UserError(
            f"{' and '.join(lists.values())} were written from different input lists: the input "
            "changed between two tasks. Rebuild the older parts."
        )
