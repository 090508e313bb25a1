"""A run's history, read from the files in its save folder while it goes on or afterwards.

``metrics.jsonl`` has one JSON object per line. Every object has ``iteration``; what else it has
says what it is: ``lm loss`` (null where no step had one) makes it an interval of training, keys
``validation/NAME`` a validation, ``event`` something that happened: ``start`` of a process after
this iteration, ``fold`` begun with it, ``end`` of a process with its ``outcome``: ``done``,
``stopped`` or ``failed``. A run that resumes from a checkpoint appends to the same file, and may do
iterations again that were logged before: the later ones hold, the earlier ones are kept apart as
abandoned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint import manifest
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.metric_registry import METRICS_FILE

LM_LOSS = "lm loss"
VALIDATION_PREFIX = "validation/"
CONSUMED_PREFIX = "consumed tokens/"

ROUTINE_EVENTS = ("start", "fold", "end")
"""Events of every run; the others are exceptions, such as ``bad step``, and say ``why``."""

JsonRecord = dict[str, Any]


@dataclass(frozen=True)
class FoldSpan:
    """The part of a run that one fold fills."""

    name: str
    first: int
    """The iteration before its first one."""
    last: int


@dataclass
class MetricsHistory:
    """A run so far."""

    folder: Path
    training: list[JsonRecord] = field(default_factory=list)
    """Intervals that hold, by iteration."""
    abandoned: list[list[JsonRecord]] = field(default_factory=list)
    """Intervals that a restart did again, one list per restart."""
    validation: list[JsonRecord] = field(default_factory=list)
    events: list[JsonRecord] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    """Iterations that a new process went on from."""
    damaged_lines: int = 0
    config: Config | None = None

    @property
    def iteration(self) -> int:
        """The last one that was logged."""
        return max((int(r["iteration"]) for r in [*self.training, *self.validation]), default=0)

    def values(self, name: str) -> tuple[list[int], list[float]]:
        """Iterations and finite values of a training metric, where it was logged."""
        found = [
            (int(r["iteration"]), float(r[name])) for r in self.training if _has_number(r, name)
        ]
        return [i for i, _ in found], [v for _, v in found]

    def validation_sets(self) -> dict[str, tuple[list[int], list[float]]]:
        """Iterations and losses of each validation set."""
        sets: dict[str, tuple[list[int], list[float]]] = {}
        for record in self.validation:
            for key in record:
                if key.startswith(VALIDATION_PREFIX) and _has_number(record, key):
                    iterations, losses = sets.setdefault(
                        key.removeprefix(VALIDATION_PREFIX), ([], [])
                    )
                    iterations.append(int(record["iteration"]))
                    losses.append(float(record[key]))
        return sets

    def consumed_by_dataset(self) -> dict[str, tuple[list[int], list[float]]]:
        """Iterations and tokens trained on of each dataset."""
        names = {
            key for record in self.training for key in record if key.startswith(CONSUMED_PREFIX)
        }
        return {name.removeprefix(CONSUMED_PREFIX): self.values(name) for name in sorted(names)}

    def folds(self) -> list[FoldSpan]:
        """The folds trained on so far, in order.

        Bounds are as fine as the log interval, where no event tells them.
        """
        begun = {str(e.get("fold")): int(e["iteration"]) - 1 for e in reversed(self.events)}
        spans: list[FoldSpan] = []
        for before, record in pairwise([{"iteration": 0}, *self.training]):
            name, last = record.get("fold"), int(record["iteration"])
            if name is None:
                continue
            if spans and spans[-1].name == name:
                spans[-1] = FoldSpan(name, spans[-1].first, last)
                continue
            first = begun.get(name, int(before["iteration"])) if spans else 0
            spans = [*spans[:-1], *(FoldSpan(s.name, s.first, first) for s in spans[-1:])]
            spans.append(FoldSpan(name, first, last))
        return spans

    def last(self, name: str) -> float | None:
        """The last value of a training metric."""
        values = self.values(name)[1]
        return values[-1] if values else None


def read_history(folder: Path) -> MetricsHistory:
    """Read a run's save folder.

    Raises:
        UserError: it holds no metrics.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: there is no {METRICS_FILE}; give the folder that the run got as --save"
        )
    history = MetricsHistory(folder)
    history.config = _config(folder)
    text = path.read_text(encoding="utf-8", errors="replace")
    # A run in progress may be in the middle of its last line.
    records = list(_parse(text[: text.rfind("\n") + 1].splitlines(), history))
    for record in records:
        _add_record(record, history)
    history.validation = _merge_by_iteration(history.validation)
    return history


def _parse(lines: Iterable[str], history: MetricsHistory) -> Iterable[JsonRecord]:
    for line in lines:
        record = parse_record(line)
        if record is None:
            history.damaged_lines += 1
        else:
            yield record


def parse_record(line: str) -> JsonRecord | None:
    """One line of the file; None if it is damaged, as the last one of a killed run may be."""
    try:
        record = json.loads(line)
        int(record["iteration"])
    except (ValueError, KeyError, TypeError):
        return None
    return dict(record)


def _add_record(record: JsonRecord, history: MetricsHistory) -> None:
    iteration = int(record["iteration"])
    if "event" in record:
        history.events.append(record)
        if record["event"] == "start" and history.training:
            _drop_after(iteration, history)
    elif LM_LOSS in record:
        if history.training and iteration <= int(history.training[-1]["iteration"]):
            _drop_after(iteration - 1, history)
        history.training.append(record)
    elif any(key.startswith(VALIDATION_PREFIX) for key in record):
        history.validation.append(record)


def _drop_after(iteration: int, history: MetricsHistory) -> None:
    """A process goes on from ``iteration``: what was logged after it does not hold."""
    history.restarts.append(iteration)
    lost = [r for r in history.training if int(r["iteration"]) > iteration]
    if lost:
        history.abandoned.append(lost)
        history.training = history.training[: -len(lost)]
    history.validation = [r for r in history.validation if int(r["iteration"]) <= iteration]


def _merge_by_iteration(records: list[JsonRecord]) -> list[JsonRecord]:
    """One record per iteration: a set validated alone later does not hide the others."""
    merged: dict[int, JsonRecord] = {}
    for record in records:
        merged.setdefault(int(record["iteration"]), {}).update(record)
    return [merged[iteration] for iteration in sorted(merged)]


def _has_number(record: JsonRecord, name: str) -> bool:
    """Whether a record has a finite value; NaN is null, and was ``NaN`` in older files."""
    value = record.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def _config(folder: Path) -> Config | None:
    """The configuration in the newest checkpoint; None if there is none yet."""
    try:
        return load_config(manifest.newest_checkpoint(folder) / manifest.CONFIG)
    except (UserError, OSError):
        return None
