"""One input list over many tasks of a Slurm array, and the parts joined again.

Each task takes a run of consecutive files of about equal size, so the parts joined in order are
what one task would have made. Large files of plain JSON lines are cut between lines. Which files
a task takes depends on nothing but the list.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.documents import read_manifest
from data_tools.preprocess.compression import HEAD_BYTES, find_opener
from data_tools.preprocess.sources import InputSource
from megatron_llmjp.errors import UserError

CUT_BYTES = 64 * 1024 * 1024
"""Files of plain lines are cut from this size on; smaller ones go to one task."""
PART = re.compile(r"_part(\d{5})of(\d{5})_(.+)_document")


def parse_shard(text: str) -> tuple[int, int]:
    """Return number and count of this task from ``--shard``.

    ``3/16`` is task 3 of 0 to 15. ``slurm/16`` takes the number from the Slurm array; the count
    is given, since Slurm's own would be wrong when some tasks are submitted again.

    Raises:
        UserError: it is neither, or there is no Slurm array around.
    """
    match = re.fullmatch(r"(\d+|slurm)/(\d+)", text)
    if not match:
        raise UserError(f"--shard {text}: expected NUMBER/COUNT such as 0/16, or slurm/16")
    task = os.environ.get("SLURM_ARRAY_TASK_ID") if match[1] == "slurm" else match[1]
    if task is None:
        raise UserError(
            f"--shard {text}: SLURM_ARRAY_TASK_ID is not set; submit with sbatch --array="
            f"0-{int(match[2]) - 1}, or give --shard NUMBER/{match[2]}"
        )
    number, count = int(task), int(match[2])
    if not 0 <= number < count <= 99999:
        raise UserError(f"--shard {text}: task {number} is not among 0 to {count - 1}")
    return number, count


def part_prefix(prefix: str, number: int, count: int) -> str:
    """Return the output prefix of one task."""
    return f"{prefix}_part{number:05}of{count:05}"


def take_shard(
    sources: list[InputSource], number: int, count: int
) -> tuple[list[InputSource], str]:
    """Return the sources of one task, and a checksum of the whole list.

    Raises:
        UserError: a source is a pipe, which tasks cannot share.
    """
    for source in sources:
        if not source.seekable:
            raise UserError(f"--shard: {source.name} is a pipe; tasks need files")
    total, before, mine = sum(source.size for source in sources) or 1, 0, []
    for source in sources:
        middle = before + source.size / 2
        if _can_be_cut(source):
            bounds = (total * at // count - before for at in (number, number + 1))
            start, end = (min(max(bound, 0), source.size) for bound in bounds)
            if start < end:
                mine.append(replace(source, start=start, end=end))
        elif min(int(middle * count / total), count - 1) == number:
            mine.append(source)
        before += source.size
    whole = "\n".join(f"{Path(source.name).name} {source.size}" for source in sources)
    return mine, f"{zlib.crc32(whole.encode()):08x}"


def _can_be_cut(source: InputSource) -> bool:
    """Return whether a file is large, and holds lines whose place is known without reading them."""
    if source.size < CUT_BYTES:
        return False
    with Path(source.name).open("rb") as file:
        head = file.read(HEAD_BYTES)
    return not head.startswith(b"PAR1") and find_opener(source, head) is None


def uneven_shards_warning(sources: list[InputSource], count: int) -> str:
    """Return a warning on files too large for one task that cannot be cut; empty if none is."""
    share = sum(source.size for source in sources) / count
    large = [s for s in sources if s.size > 2 * max(share, CUT_BYTES) and not _can_be_cut(s)]
    if not large:
        return ""
    return (
        f"warning: {large[0].name} ({large[0].size:,} bytes) is larger than two tasks' shares, but "
        "one task reads it whole: where a line begins in a compressed file is known only after "
        "all before it is decompressed, and a Parquet file is read by row groups. Split it into "
        f"files, or decompress it.{f' So are {len(large) - 1:,} more.' if len(large) > 1 else ''}"
    )


def find_parts(prefix: str) -> dict[str, list[str]]:
    """Return for each key the prefixes of all parts, in order.

    Raises:
        UserError: parts are missing, or were not made from one list by one array.
    """
    found: dict[tuple[str, int], dict[int, str]] = {}
    folder, name = Path(prefix).parent, Path(prefix).name
    for path in folder.glob("*.idx") if folder.is_dir() else ():
        match = PART.fullmatch(path.stem[len(name) :])
        if match and path.stem.startswith(name):
            number, count, key = int(match[1]), int(match[2]), match[3]
            found.setdefault((key, count), {})[number] = str(path.with_suffix(""))
    if not found:
        raise UserError(f"--parts {prefix}: found no {prefix}_part*of*_*_document.idx")
    parts: dict[str, list[str]] = {}
    for (key, count), by_number in sorted(found.items()):
        if key in parts:
            raise UserError(
                f"--parts {prefix}: there are parts of two arrays, of {len(parts[key])} and of "
                f"{count} tasks. Remove those of the wrong one."
            )
        if missing := [n for n in range(count) if n not in by_number]:
            raise UserError(
                f"--parts {prefix}: {len(missing)} of {count} parts are missing for key '{key}': "
                f"{' '.join(map(str, missing[:50]))}. Submit them again: sbatch --array="
                f"{','.join(map(str, missing[:50]))} slurm/preprocess_data.sh --shard "
                f"slurm/{count} and the other arguments as before"
            )
        parts[key] = [by_number[number] for number in range(count)]
        _check_list(parts[key])
    return parts


def _check_list(prefixes: list[str]) -> None:
    lists: dict[Any, str] = {}
    for prefix in prefixes:
        recipe = (read_manifest(prefix) or {}).get("recipe", {})
        lists.setdefault(recipe.get("shard", {}).get("list"), prefix)
    if len(lists) > 1:
        raise UserError(
            f"{' and '.join(lists.values())} were made from different input lists: the input "
            "changed between two tasks. Make the older ones again."
        )
