"""The record of an unfinished run: what is safely on disk, and where to go on.

An append-only file of JSON lines in the work folder. The first line says what is being made from
what; each further line is a point to resume at, written after the data it speaks of was fsynced.
A torn last line, all that a kill -9 can leave, is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.preprocess.sources import InputSource
from megatron_llmjp.data.indexed_dataset_writer import WriterPosition
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import write_atomically


@dataclass
class SourceCounts:
    """What came of one source so far; counts in documents and bytes of decompressed input."""

    lines: int = 0
    documents: int = 0
    bytes: int = 0
    blank: int = 0
    empty: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class ResumePoint:
    """A point to resume at.

    Attributes:
        source: number of the source being read; all before it are finished.
        position: the end of the last block written, as in blocks.Block.
        done: this source is finished too.
        tally: of this source.
        earlier: tallies of sources finished since the point before.
        outputs: position of the writer of each key.
        rejected: sizes of the quarantine files in bytes.
        finishing: everything is written; only renames are left.
    """

    source: int = 0
    position: int = 0
    done: bool = False
    tally: SourceCounts = field(default_factory=SourceCounts)
    earlier: dict[int, SourceCounts] = field(default_factory=dict)
    outputs: dict[str, WriterPosition] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    finishing: bool = False

    def tallies(self) -> Iterator[SourceCounts]:
        """Return the tallies that this point holds."""
        yield from (*self.earlier.values(), self.tally)


class ResumeJournal:
    """The journal of one work folder."""

    def __init__(
        self,
        path: Path,
        recipe: dict[str, Any],
        sources: Sequence[InputSource],
        forget_others: bool,
    ) -> None:
        """Open the journal, or begin one.

        Args:
            path: the file.
            recipe: what is being made: ``tokenizer``, ``options`` and ``sources``, plain JSON.
            sources: the sources of the recipe.
            forget_others: begin anew where the file belongs to another recipe.

        Raises:
            UserError: the file belongs to another recipe, and documents were made by it.
        """
        self.path = path
        self.recipe, self.sources = recipe, sources
        self.points: list[ResumePoint] = []
        if path.exists():
            try:
                self.points = self._still_valid()
            except UserError:
                if not forget_others:
                    raise
        lines = [recipe, *(asdict(point) for point in self.points)]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a", encoding="utf-8")

    @property
    def last(self) -> ResumePoint:
        """The point to resume at; a fresh one where there is none."""
        return self.points[-1] if self.points else ResumePoint()

    def tallies(self) -> dict[int, SourceCounts]:
        """Return the last known tally of each source."""
        known: dict[int, SourceCounts] = {}
        for point in self.points:
            known |= point.earlier | {point.source: point.tally}
        return known

    def add(self, point: ResumePoint) -> None:
        """Append a point and bring it to disk."""
        self.points.append(point)
        self._file.write(json.dumps(asdict(point)) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _still_valid(self) -> list[ResumePoint]:
        """Return the points whose sources have not changed since."""
        lines = _whole_lines(self.path)
        if not lines:
            return []
        before, points = lines[0], [_point(line) for line in lines[1:]]
        if not any(tally.documents for point in points for tally in point.tallies()):
            return []  # nothing is lost, such as after a mistyped flag
        self._refuse_other_recipe(before, points)
        unchanged = 0
        for old, new, source in zip(
            before["sources"], self.recipe["sources"], self.sources, strict=False
        ):
            if not source.is_same(new, old):
                break
            unchanged += 1
        every = unchanged == len(before["sources"]) == len(self.recipe["sources"])
        return [p for p in points if p.source < unchanged and (every or not p.finishing)]

    def _refuse_other_recipe(self, before: dict[str, Any], points: list[ResumePoint]) -> None:
        old, new = dict(before["options"]), dict(self.recipe["options"])
        if not any(p.tally.rejected or p.tally.empty for p in points):
            old.pop("on_error"), new.pop("on_error")  # without a bad line yet it changed nothing
        for name, was, now in (
            ("options", old, new),
            ("tokenizer", before["tokenizer"], self.recipe["tokenizer"]),
        ):
            if was != now:
                raise UserError(
                    f"{self.path.parent}: holds an unfinished run with another {name}:\n  then "
                    f"{json.dumps(was)}\n  now  {json.dumps(now)}\nUse the same command to finish "
                    "it, another --output-prefix, or --overwrite to start again."
                )


def is_finishing(path: Path) -> bool:
    """Return whether this journal is of a run that only has files to rename."""
    lines = _whole_lines(path) if path.exists() else []
    return bool(lines) and bool(lines[-1].get("finishing"))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _point(line: dict[str, Any]) -> ResumePoint:
    outputs = {key: WriterPosition(**position) for key, position in line.pop("outputs").items()}
    earlier = {int(source): SourceCounts(**tally) for source, tally in line.pop("earlier").items()}
    tally = SourceCounts(**line.pop("tally"))
    return ResumePoint(outputs=outputs, tally=tally, earlier=earlier, **line)
