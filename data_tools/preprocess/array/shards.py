"""Sharding of the input over the tasks of a Slurm array, and lookup of the parts they wrote.

Each part is a range of consecutive files with about the same number of bytes of text, so that
concatenating the parts in order gives the output of a single task. Large files are cut where their
format allows it. The division depends only on the list of files and on their contents.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.documents import read_dataset_manifest
from data_tools.preprocess.input.cutting import read_remote_heads, text_percentages, why_not_cut
from data_tools.preprocess.input.sources import InputSource
from megatron_llmjp.errors import UserError
from megatron_llmjp.formatting import format_names

MIN_SPLIT_BYTES = 4 << 20
"""Minimum amount of text in a file that is cut."""
SMALL_SHARE = 8
"""Files with less than this fraction of the text of a part are not cut."""
_PART_NAME = re.compile(r"_part(\d{5})of(\d{5})_(.+)_document")


def part_prefix(prefix: str, number: int, count: int) -> str:
    """Return the output prefix of one part."""
    return f"{prefix}_part{number:05}of{count:05}"


@dataclass(frozen=True)
class _Weighted:
    """A source, its share of the text, and whether it can be cut.

    Attributes:
        percent: bytes of text per 100 bytes on disk.
        before: weight of all sources before it, in hundredths of a byte of text.
        uncut: why the source cannot be cut; None if it can, "" if it is too small to be cut.
    """

    source: InputSource
    percent: int
    before: int
    uncut: str | None

    @property
    def weight(self) -> int:
        return self.source.size * self.percent


class ShardPlan:
    """Division of the input into parts.

    Attributes:
        count: number of parts.
        digest: checksum of everything that decides the division, to compare tasks.
    """

    def __init__(
        self,
        sources: Sequence[InputSource],
        count: int,
        keys: Sequence[str] = ("text",),
        cut_streams: bool = True,
    ) -> None:
        """Plan ``count`` parts.

        Args:
            sources: all input files.
            count: number of parts.
            keys: JSON keys of the text.
            cut_streams: whether compressed files may be cut. The offsets of lines in a part of one
                are not those in the whole file.

        Raises:
            UserError: a source is a pipe, which cannot be sharded.
        """
        for source in sources:
            if not source.seekable:
                raise UserError(f"--shard: {source.name} is a pipe; sharding requires files")
        self.count, self._cut_streams = count, cut_streams
        read_remote_heads([source for source in sources if source.size >= MIN_SPLIT_BYTES])
        percentages = text_percentages(sources, keys)
        self._total = sum(s.size * p for s, p in zip(sources, percentages, strict=True)) or 1
        self._sources: list[_Weighted] = []
        before = 0
        for source, percent in zip(sources, percentages, strict=True):
            found = _Weighted(source, percent, before, self._why_uncut(source, percent))
            self._sources.append(found)
            before += found.weight
        lines = [
            f"{Path(w.source.name).name} {w.source.size} {w.percent} {w.uncut}"
            for w in self._sources
        ]
        whole = "\n".join(lines)
        self.digest = f"{zlib.crc32(whole.encode(errors='surrogateescape')):08x}"

    def part(self, number: int) -> list[InputSource]:
        """Return the sources of a part, some of which may be parts of files."""
        mine = []
        for found in self._sources:
            source = found.source
            if found.uncut is None:
                start, end = (self._offset(found, at) for at in (number, number + 1))
                if start < end:
                    mine.append(replace(source, start=start, end=end))
            elif self._part_of_middle(found) == number:
                mine.append(source)
        return mine

    @property
    def bytes(self) -> int:
        """Bytes of all sources on disk."""
        return sum(found.source.size for found in self._sources)

    def warning(self) -> str:
        """Return a warning on files that are too large for one task but cannot be cut, or ""."""
        limit = 2 * max(self._total // self.count, MIN_SPLIT_BYTES * 100)
        large = [w for w in self._sources if w.uncut and w.weight > limit]
        if not large:
            return ""
        shares = self.count * max(w.weight for w in large) / self._total
        named = [f"{w.source.name} ({w.source.size:,} bytes, {w.uncut})" for w in large]
        return (
            f"warning: {format_names(named)} cannot be cut and exceeds the shares of two tasks; "
            f"one task reads up to {shares:.1f} shares. Use formats that can be cut (plain lines, "
            "bgzip, pzstd, Parquet with several row groups), or more files."
        )

    def _why_uncut(self, source: InputSource, percent: int) -> str | None:
        """Return why a source is not cut; None if it is."""
        text = source.size * percent // 100
        if text < MIN_SPLIT_BYTES or text * SMALL_SHARE < self._total // 100 // self.count:
            return ""
        return why_not_cut(source, self._cut_streams) or None

    def _offset(self, found: _Weighted, at: int) -> int:
        """Return the byte of a file at which part ``at`` begins, within the file."""
        bound = self._total * at // self.count - found.before
        return min(max(bound // found.percent, 0), found.source.size)

    def _part_of_middle(self, found: _Weighted) -> int:
        middle = 2 * found.before + found.weight
        return min(middle * self.count // (2 * self._total), self.count - 1)


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
