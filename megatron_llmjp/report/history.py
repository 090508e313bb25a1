"""The history of a run, read from its save folder during or after the run.

The format of ``metrics.jsonl`` is described in ``metric_registry.py``. Events are ``start`` (a
process starts after this iteration), ``fold`` (a fold begins with this iteration), ``end`` (a
process ends, with its ``outcome``: ``done``, ``stopped`` or ``failed``) and exceptional events such
as ``bad step``. A resumed run appends to the same file and may repeat iterations that were logged
before: the later records are valid, the earlier ones are kept as abandoned.
"""

from __future__ import annotations

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
from megatron_llmjp.metric_registry import (
    CONSUMED_SAMPLES,
    DATASET_LOSS,
    DATASET_TOKENS,
    EVENT,
    FOLD,
    GRAD_NORM,
    GROUPS,
    ITERATION,
    LM_LOSS,
    METRICS,
    METRICS_FILE,
    PARAMS_NORM,
    VALIDATION_LOSS,
    Z_LOSS,
)
from megatron_llmjp.report.json_lines import parse_object

DIVERGING = (LM_LOSS.name, Z_LOSS.name, GRAD_NORM.name, PARAMS_NORM.name)
"""Metrics that may be NaN or infinite in a valid record."""
DIVERGING_GROUPS = tuple(f"{group.prefix}/" for group in (VALIDATION_LOSS, DATASET_LOSS))
"""Prefixes of other such metrics."""
MAX_NUMBER = 2**63
"""Limit of the numbers in the metrics file; a larger one is damage."""
ROUTINE_EVENTS = ("start", "fold", "end")
"""Events of every run; the others are exceptional, such as ``bad step``, with a ``why``."""

JsonRecord = dict[str, Any]
"""A line of the metrics file."""


@dataclass(frozen=True)
class FoldSpan:
    """Range of iterations of a fold."""

    name: str
    first: int
    """The iteration before its first one."""
    last: int


@dataclass
class MetricsHistory:
    """Metrics and events of a run so far."""

    folder: Path
    training: list[JsonRecord] = field(default_factory=list)
    """Valid log intervals, by iteration."""
    abandoned: list[list[JsonRecord]] = field(default_factory=list)
    """Intervals that were repeated after a restart, one list per restart."""
    validation: list[JsonRecord] = field(default_factory=list)
    events: list[JsonRecord] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    """Iterations that restarts resumed from."""
    damaged_lines: int = 0
    config: Config | None = None

    @property
    def iteration(self) -> int:
        """The last logged iteration."""
        return max((int(r[ITERATION]) for r in [*self.training, *self.validation]), default=0)

    def values(self, name: str) -> tuple[list[int], list[float]]:
        """Return the iterations and finite values of a training metric."""
        found = [(int(r[ITERATION]), float(r[name])) for r in self.training if _has_number(r, name)]
        return [i for i, _ in found], [v for _, v in found]

    def validation_sets(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return the iterations and losses of each validation set."""
        sets: dict[str, tuple[list[int], list[float]]] = {}
        for record in self.validation:
            for key, name in VALIDATION_LOSS.names(record).items():
                if _has_number(record, key):
                    iterations, losses = sets.setdefault(name, ([], []))
                    iterations.append(int(record[ITERATION]))
                    losses.append(float(record[key]))
        return sets

    def consumed_by_dataset(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return the iterations and consumed tokens of each dataset."""
        keys = sorted({key for record in self.training for key in record})
        return {name: self.values(key) for key, name in DATASET_TOKENS.names(keys).items()}

    def folds(self) -> list[FoldSpan]:
        """Return the folds trained on so far, in order.

        Without events of folds, their bounds are accurate to the log interval.
        """
        begun = {str(e.get(FOLD)): int(e[ITERATION]) - 1 for e in reversed(self.events)}
        spans: list[FoldSpan] = []
        for before, record in pairwise([{ITERATION: 0}, *self.training]):
            name, last = record.get(FOLD), int(record[ITERATION])
            if name is None:
                continue
            if spans and spans[-1].name == name:
                spans[-1] = FoldSpan(name, spans[-1].first, last)
                continue
            first = begun.get(name, int(before[ITERATION])) if spans else 0
            spans = [*spans[:-1], *(FoldSpan(s.name, s.first, first) for s in spans[-1:])]
            spans.append(FoldSpan(name, first, last))
        return spans

    def last(self, name: str) -> float | None:
        """Return the last value of a training metric; None without any."""
        values = self.values(name)[1]
        return values[-1] if values else None


def read_history(folder: Path) -> MetricsHistory:
    """Read the metrics of a save folder.

    Raises:
        UserError: the folder has no metrics file.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} has no {METRICS_FILE}; expected the folder given to the run as --save"
        )
    history = MetricsHistory(folder)
    history.config = _config(folder)
    text = path.read_text(encoding="utf-8", errors="replace")
    # A running process may be writing the last line.
    # Not splitlines(), which also splits at characters that names may contain, such as U+2028.
    records = list(_parse(text[: text.rfind("\n") + 1].split("\n")[:-1], history))
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
    """Parse a line of the file; None if it is damaged, as the last one of a killed run may be.

    Numbers that are not finite become None, except losses and norms, which diverge.
    """
    found = parse_object(line)
    if found is None:
        return None
    record = {key: value if _is_plausible(key, value) else None for key, value in found.items()}
    if record.get(ITERATION) is None or not all(_is_valid(*item) for item in record.items()):
        return None
    return record


def _is_plausible(key: str, value: Any) -> bool:
    return not _is_not_finite(value) or key in DIVERGING or key.startswith(DIVERGING_GROUPS)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_valid(key: str, value: Any) -> bool:
    """Return whether a value of a record has the type of its key, or is null."""
    if value is None:
        return True
    if key in (EVENT, FOLD):
        return isinstance(value, str)
    numbers = (ITERATION, CONSUMED_SAMPLES, *METRICS)
    if key in numbers or key.startswith(tuple(f"{prefix}/" for prefix in GROUPS)):
        is_number = isinstance(value, int | float)
        return is_number and (abs(value) < MAX_NUMBER or _is_not_finite(value))
    return True


def _add_record(record: JsonRecord, history: MetricsHistory) -> None:
    iteration = int(record[ITERATION])
    if EVENT in record:
        history.events.append(record)
        if record[EVENT] == "start" and history.training:
            _drop_after(iteration, history)
    elif LM_LOSS.name in record:
        if history.training and iteration <= int(history.training[-1][ITERATION]):
            _drop_after(iteration - 1, history)
        history.training.append(record)
    elif VALIDATION_LOSS.names(record):
        history.validation.append(record)


def _drop_after(iteration: int, history: MetricsHistory) -> None:
    """Mark intervals after ``iteration``, which a process resumed from, as abandoned."""
    history.restarts.append(iteration)
    abandoned = [r for r in history.training if int(r[ITERATION]) > iteration]
    if abandoned:
        history.abandoned.append(abandoned)
        history.training = history.training[: -len(abandoned)]
    history.validation = [r for r in history.validation if int(r[ITERATION]) <= iteration]


def _merge_by_iteration(records: list[JsonRecord]) -> list[JsonRecord]:
    """Merge records by iteration: a later one with one validation set keeps the other sets."""
    merged: dict[int, JsonRecord] = {}
    for record in records:
        merged.setdefault(int(record[ITERATION]), {}).update(record)
    return [merged[iteration] for iteration in sorted(merged)]


def _has_number(record: JsonRecord, name: str) -> bool:
    """Return whether a record has a finite value; NaN is null, in older files ``NaN``."""
    value = record.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def _config(folder: Path) -> Config | None:
    """Return the configuration of the newest checkpoint; None without a checkpoint."""
    try:
        return load_config(manifest.newest_checkpoint(folder) / manifest.CONFIG)
    except (UserError, OSError):
        return None
