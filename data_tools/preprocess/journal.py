"""Journal of an unfinished run: the points from which it can resume.

An append-only file of JSON lines in the work folder. The first line is the recipe: tokenizer,
options and sources. Each further line is a resume point, written after the data before it was
fsynced. An incomplete last line, the most that a kill -9 can leave, is ignored.
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
    """Counts of one source: lines, documents, bytes of decompressed input, tokens by key."""

    lines: int = 0
    documents: int = 0
    bytes: int = 0
    blank: int = 0
    empty: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class ResumePoint:
    """A state to resume from.

    Attributes:
        source: number of the current source; all earlier ones are finished.
        position: end of the last block written, as in blocks.Block.
        done: the current source is finished too.
        counts: counts of the current source.
        finished: counts of the sources that were finished since the previous point.
        outputs: position of the writer of each key.
        rejected: sizes of the quarantine files in bytes.
        finishing: all data is written, and only renames remain.
    """

    source: int = 0
    position: int = 0
    done: bool = False
    counts: SourceCounts = field(default_factory=SourceCounts)
    finished: dict[int, SourceCounts] = field(default_factory=dict)
    outputs: dict[str, WriterPosition] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    finishing: bool = False

    def all_counts(self) -> Iterator[SourceCounts]:
        """Yield all counts in this point."""
        yield from (*self.finished.values(), self.counts)

    def to_json(self) -> dict[str, Any]:
        """Return the point as stored, with the key names of all versions."""
        content = asdict(self)
        return content | {"tally": content.pop("counts"), "earlier": content.pop("finished")}


class ResumeJournal:
    """Journal of one work folder."""

    def __init__(
        self,
        path: Path,
        recipe: dict[str, Any],
        sources: Sequence[InputSource],
        overwrite: bool,
    ) -> None:
        """Open the journal, or create it.

        Args:
            path: the journal file.
            recipe: ``tokenizer``, ``options`` and ``sources`` of the run, as plain JSON.
            sources: the sources of the recipe.
            overwrite: start from the beginning if the journal belongs to another recipe.

        Raises:
            UserError: the journal belongs to another recipe that has already written documents.
        """
        self.path = path
        self.recipe, self.sources = recipe, sources
        self.points: list[ResumePoint] = []
        if path.exists():
            try:
                self.points = self._load_valid_points()
            except UserError:
                if not overwrite:
                    raise
        lines = [recipe, *(point.to_json() for point in self.points)]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a", encoding="utf-8")

    @property
    def last(self) -> ResumePoint:
        """The point to resume from; an initial one if there is none."""
        return self.points[-1] if self.points else ResumePoint()

    def counts_by_source(self) -> dict[int, SourceCounts]:
        """Return the last recorded counts of each source."""
        known: dict[int, SourceCounts] = {}
        for point in self.points:
            known |= point.finished | {point.source: point.counts}
        return known

    def add(self, point: ResumePoint) -> None:
        """Append a point and flush it to disk."""
        self.points.append(point)
        self._file.write(json.dumps(point.to_json()) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _load_valid_points(self) -> list[ResumePoint]:
        """Return the points whose sources have not changed."""
        lines = _read_lines(self.path)
        if not lines:
            return []
        recorded, points = lines[0], [_point_from_json(line) for line in lines[1:]]
        if not any(counts.documents for point in points for counts in point.all_counts()):
            return []  # nothing is lost, for example after a mistyped flag
        self._check_same_recipe(recorded, points)
        unchanged = 0
        for old, new, source in zip(
            recorded["sources"], self.recipe["sources"], self.sources, strict=False
        ):
            if not source.is_same(new, old):
                break
            unchanged += 1
        every = unchanged == len(recorded["sources"]) == len(self.recipe["sources"])
        return [p for p in points if p.source < unchanged and (every or not p.finishing)]

    def _check_same_recipe(self, recorded: dict[str, Any], points: list[ResumePoint]) -> None:
        old, new = dict(recorded["options"]), dict(self.recipe["options"])
        if not any(p.counts.rejected or p.counts.empty for p in points):
            old.pop("on_error"), new.pop("on_error")  # it has no effect before the first bad line
        for name, was, now in (
            ("options", old, new),
            ("tokenizer", recorded["tokenizer"], self.recipe["tokenizer"]),
        ):
            if was != now:
                raise UserError(
                    f"{self.path.parent}: contains an unfinished run with another {name}:\n  then "
                    f"{json.dumps(was)}\n  now  {json.dumps(now)}\nUse the same command to finish "
                    "it, another --output-prefix, or --overwrite to start from the beginning."
                )


def is_finishing(path: Path) -> bool:
    """Return whether the run of this journal only has files to rename."""
    lines = _read_lines(path) if path.exists() else []
    return bool(lines) and bool(lines[-1].get("finishing"))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _point_from_json(line: dict[str, Any]) -> ResumePoint:
    outputs = {key: WriterPosition(**position) for key, position in line.pop("outputs").items()}
    finished = {int(source): SourceCounts(**found) for source, found in line.pop("earlier").items()}
    counts = SourceCounts(**line.pop("tally"))
    return ResumePoint(outputs=outputs, counts=counts, finished=finished, **line)
