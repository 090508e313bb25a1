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

from pydantic import TypeAdapter, ValidationError

from data_tools.preprocess.input.remote_changes import refuse_changed_remote
from data_tools.preprocess.input.sources import InputSource
from data_tools.statistics.counts import Count, CountsByLanguage
from megatron_llmjp.data.indexed_dataset_writer import WriterPosition
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import write_atomically


@dataclass
class SourceCounts:
    """Counts of one source: lines, documents, bytes of decompressed input, tokens by key.

    ``texts`` has the counts of documents by key and language. Earlier versions did not record it.
    ``removed`` has the documents that were removed on request, by reason.
    """

    lines: Count = 0
    documents: Count = 0
    bytes: Count = 0
    blank: Count = 0
    empty: Count = 0
    rejected: dict[str, Count] = field(default_factory=dict)
    tokens: dict[str, Count] = field(default_factory=dict)
    texts: dict[str, CountsByLanguage] = field(default_factory=dict)
    removed: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class SlicePosition:
    """Number of slices of arranged documents that are written, and position of their writer."""

    slices: Count = 0
    output: WriterPosition = field(default_factory=WriterPosition)


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
        arranged: position in the arranged documents of each key, when all input is encoded.
        finishing: all data is written, and only renames remain.
    """

    source: Count = 0
    position: Count = 0
    done: bool = False
    counts: SourceCounts = field(default_factory=SourceCounts)
    finished: dict[Count, SourceCounts] = field(default_factory=dict)
    outputs: dict[str, WriterPosition] = field(default_factory=dict)
    rejected: dict[str, Count] = field(default_factory=dict)
    arranged: dict[str, SlicePosition] = field(default_factory=dict)
    finishing: bool = False

    def all_counts(self) -> Iterator[SourceCounts]:
        """Yield all counts in this point."""
        yield from (*self.finished.values(), self.counts)

    def to_json(self) -> dict[str, Any]:
        """Return the point as stored, with the key names of all versions."""
        content = asdict(self)
        for counts in (content["counts"], *content["finished"].values()):
            if not counts["removed"]:
                del counts["removed"]
        if not self.arranged:
            del content["arranged"]
        return content | {"tally": content.pop("counts"), "earlier": content.pop("finished")}


_POINTS = TypeAdapter(list[ResumePoint], config={"extra": "forbid"})


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
            UserError: the journal is damaged, or belongs to another recipe that has already written
                documents.
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
        recorded, points = lines[0], _points_from_json(self.path, lines[1:])
        if not any(counts.documents for point in points for counts in point.all_counts()):
            return []  # nothing is lost, for example after a mistyped flag
        before = recorded.get("sources")
        if not isinstance(before, list) or not all(isinstance(source, dict) for source in before):
            raise _damage(self.path, "its recipe has no list of sources")
        self._check_same_recipe(recorded, points)
        unchanged = 0
        for old, new, source in zip(before, self.recipe["sources"], self.sources, strict=False):
            if not source.is_same(new, old):
                break
            unchanged += 1
        read = before[: max((p.source for p in points), default=-1) + 1]
        refuse_changed_remote(self.sources, self.recipe["sources"], read, str(self.path.parent))
        earlier = recorded.get("encoders")
        if isinstance(earlier, list):
            known = set(filter(lambda name: isinstance(name, str), earlier))
            self.recipe["encoders"] = sorted(known | set(self.recipe.get("encoders", [])))
        every = unchanged == len(before) == len(self.recipe["sources"])
        valid = [
            point
            for point in points
            if point.source < unchanged and (every or not (point.finishing or point.arranged))
        ]
        if any(source > p.source for p in valid for source in p.finished):
            raise _damage(self.path, "it counts documents of a source that was not read")
        return valid

    def _check_same_recipe(self, recorded: dict[str, Any], points: list[ResumePoint]) -> None:
        parts = [recorded.get("options"), recorded.get("tokenizer")]
        if not all(isinstance(part, dict) for part in parts):
            raise _damage(self.path, "its recipe has no options or no tokenizer")
        old, new = dict(recorded["options"]), dict(self.recipe["options"])
        if not any(p.counts.rejected or p.counts.empty for p in points):
            for options in (old, new):  # it has no effect before the first bad line
                options.pop("on_error", None)
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
    """Return the complete lines.

    Raises:
        UserError: a line is not a JSON object.
    """
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(found, dict):
            raise _damage(path, "a line is not a JSON object")
        lines.append(found)
    return lines


def _points_from_json(path: Path, lines: Sequence[dict[str, Any]]) -> list[ResumePoint]:
    """Return the points of a journal.

    Raises:
        UserError: an entry is missing or has another type.
    """
    stored = {"tally": "counts", "earlier": "finished"}
    named = [{stored.get(name, name): value for name, value in line.items()} for line in lines]
    try:
        return _POINTS.validate_python(named)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][1:]))
        raise _damage(path, f"line {int(first['loc'][0]) + 2}: {place}: {first['msg']}") from None


def _damage(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path}: the journal of the unfinished run is damaged: {problem}. Give --overwrite to "
        "start from the beginning, or another --output-prefix."
    )
