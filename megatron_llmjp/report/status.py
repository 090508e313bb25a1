"""The status of a run, read from its save folder: progress, throughput, liveness, errors.

Only the end of the metrics file is read, so that long runs are shown as quickly as short ones.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint import manifest, run_lock
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.errors import UserError
from megatron_llmjp.metric_registry import (
    CONSUMED_SAMPLES,
    CONSUMED_TOKENS,
    EVENT,
    FOLD,
    FOLD_NUMBER,
    FOLD_PROGRESS,
    GLOBAL_BATCH_SIZE,
    ITERATION,
    LM_LOSS,
    METRICS_FILE,
    MFU,
    ROLLBACKS,
    SECONDS_PER_ITERATION,
    SECONDS_REMAINING,
    TFLOPS_PER_GPU,
    TOKENS_PER_SECOND,
    TOTAL_NAN,
    TOTAL_SKIPPED,
    TOTAL_SPIKES,
    VALIDATION_LOSS,
)
from megatron_llmjp.report.history import (
    MAX_NUMBER,
    ROUTINE_EVENTS,
    JsonRecord,
    parse_record,
)
from megatron_llmjp.report.jobs import Incident, last_error, last_hang, read_job_ends, tail
from megatron_llmjp.yaml_text import read_yaml

TAIL_BYTES = 1 << 20
"""Size of the end of the metrics file that is read: some hundred records."""
STALL_SECONDS = 120.0
"""A live run is stalled if it logged nothing for this long and for :data:`STALL_INTERVALS`."""
STALL_INTERVALS = 10
"""Number of log intervals."""


@dataclass(frozen=True)
class SavedCheckpoints:
    """The checkpoints of a run."""

    iterations: list[int]
    bytes: int
    """Size of the newest checkpoint; 0 if it is damaged."""
    seconds_ago: float
    """Age of the newest checkpoint."""


@dataclass(frozen=True)
class RunStatus:
    """Status of a run; None for unknown values."""

    folder: str
    state: str
    """running, stalled, starting, finished, stopped, requeued, failed or dead."""
    why: str
    iteration: int = 0
    skipped: int = 0
    """Steps that were not applied since the start of the run."""
    nan: int = 0
    """Bad steps among the skipped ones."""
    spikes: int = 0
    rollbacks: int = 0
    train_iters: int | None = None
    fold: str | None = None
    fold_number: int | None = None
    folds: int | None = None
    fold_progress: float | None = None
    consumed_tokens: int | None = None
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    seconds_per_iteration: float | None = None
    seconds_remaining: float | None = None
    seconds_since_log: float | None = None
    saved: SavedCheckpoints | None = None
    ends: list[dict[str, Any]] = field(default_factory=list)
    """Ends of the run's Slurm jobs, oldest first."""
    error: Incident | None = None
    hang: Incident | None = None
    event: str | None = None
    """Last exceptional event near the end of the metrics, such as a bad step."""


def read_status(folder: Path) -> RunStatus:
    """Read the status of a run; write nothing.

    Raises:
        UserError: the folder is not the save folder of a run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist")
    saved, owner = _saved_checkpoints(folder), run_lock.read_owner(folder)
    ends, hang, error = read_job_ends(folder), last_hang(folder), last_error(folder)
    metrics = folder / METRICS_FILE
    if not (metrics.exists() or saved or owner or ends or error):
        raise UserError(
            f"{folder} is not the save folder of a run: it has no {METRICS_FILE}, no checkpoint "
            "and no run in progress; expected the folder given to the run as --save"
        )
    parsed = (parse_record(line) for line in tail(metrics, TAIL_BYTES))
    records = [record for record in parsed if record is not None]
    steps = [record for record in records if LM_LOSS.name in record]
    last = steps[-1] if steps else {}
    age = time.time() - metrics.stat().st_mtime if metrics.exists() else None
    train_iters = _train_iters(folder, last, saved)
    restarted = _restarted_at(records)
    steps = [] if restarted is not None else steps
    state, why = _state(folder, owner, steps, train_iters, age, ends, _last_end(records))
    return RunStatus(
        folder=str(folder),
        state=state,
        why=why,
        iteration=restarted if restarted is not None else _count(last, ITERATION),
        train_iters=train_iters,
        skipped=_count(last, TOTAL_SKIPPED.name),
        nan=_count(last, TOTAL_NAN.name),
        spikes=_count(last, TOTAL_SPIKES.name),
        rollbacks=_count(last, ROLLBACKS.name),
        fold=last.get(FOLD),
        fold_number=_to_int(last.get(FOLD_NUMBER.name)),
        folds=_folds(folder, saved),
        fold_progress=last.get(FOLD_PROGRESS.name),
        consumed_tokens=_to_int(last.get(CONSUMED_TOKENS.name)),
        loss=last.get(LM_LOSS.name),
        validation=_validation_losses(records),
        tokens_per_second=last.get(TOKENS_PER_SECOND.name),
        tflops_per_gpu=last.get(TFLOPS_PER_GPU.name),
        mfu=last.get(MFU.name),
        seconds_per_iteration=last.get(SECONDS_PER_ITERATION.name),
        seconds_remaining=last.get(SECONDS_REMAINING.name),
        seconds_since_log=age,
        saved=saved,
        ends=ends,
        error=error,
        hang=hang,
        event=_last_exceptional_event(records),
    )


def _restarted_at(records: list[JsonRecord]) -> int | None:
    """Return the iteration that a process resumed from, if it has not logged a step yet."""
    for record in reversed(records):
        if LM_LOSS.name in record:
            return None
        if record.get(EVENT) == "start":
            return int(record[ITERATION])
    return None


def _count(record: JsonRecord, name: str) -> int:
    """Return a value of a record as an integer; 0 if it is missing or null."""
    return int(record.get(name) or 0)


def _to_int(number: float | None) -> int | None:
    return None if number is None else int(number)


def _saved_checkpoints(folder: Path) -> SavedCheckpoints | None:
    iterations = manifest.complete_iterations(folder)
    if not iterations:
        return None
    newest = folder / manifest.folder_name(iterations[-1])
    try:
        size = sum(entry.bytes for entry in manifest.read_manifest(newest).files.values())
        age = time.time() - (newest / manifest.MANIFEST).stat().st_mtime
    except (UserError, OSError):  # damaged, or removed in the meantime
        return SavedCheckpoints(iterations, 0, math.nan)
    return SavedCheckpoints(iterations, size, age)


def _train_iters(folder: Path, last: JsonRecord, saved: SavedCheckpoints | None) -> int | None:
    """Return the length of the run, computed from the remaining time and the last batch size."""
    seconds, each = last.get(SECONDS_REMAINING.name), last.get(SECONDS_PER_ITERATION.name)
    if seconds is None or not each:
        return None
    remaining = seconds / each
    if not 0 <= remaining < MAX_NUMBER:
        return None
    config = _newest_config(folder, saved)
    if config is None:  # without batch size ramp-up this is exact
        return int(last[ITERATION]) + round(remaining)
    consumed, batch_size = last.get(CONSUMED_SAMPLES), last.get(GLOBAL_BATCH_SIZE.name)
    if consumed is None or batch_size is None:
        return None
    samples = consumed + round(remaining * batch_size)
    return BatchSizeSchedule(config).iterations(samples)[0]


def _newest_config(folder: Path, saved: SavedCheckpoints | None) -> Config | None:
    """Return the configuration of the newest checkpoint; None if it cannot be read."""
    if saved is None:
        return None
    newest = folder / manifest.folder_name(saved.iterations[-1])
    try:
        return load_config(newest / manifest.CONFIG)
    except (UserError, OSError):
        return None


def _folds(folder: Path, saved: SavedCheckpoints | None) -> int | None:
    """Return the number of folds, from the fold file in the newest checkpoint."""
    if saved is None:
        return None
    copy = folder / manifest.folder_name(saved.iterations[-1]) / manifest.FOLDS
    try:
        folds = read_yaml(copy, "fold file").data.get("folds")
    except UserError:
        return None
    return len(folds) if isinstance(folds, list) else None


def _state(
    folder: Path,
    owner: run_lock.Owner | None,
    steps: list[JsonRecord],
    train_iters: int | None,
    age: float | None,
    ends: list[dict[str, Any]],
    ended: JsonRecord | None,
) -> tuple[str, str]:
    """Return the state of the run and its reason."""
    if owner is not None:
        if not run_lock.is_owner_alive(folder, owner):
            return "dead", f"{owner} was killed, or its machine is down"
        if not steps or age is None:
            return "starting", str(owner)
        if age > max(STALL_SECONDS, STALL_INTERVALS * _log_interval_seconds(steps)):
            return "stalled", f"{owner} is alive, but logs nothing"
        return "running", str(owner)
    outcome = ended.get("outcome") if ended is not None else None
    if ended is not None and outcome == "failed":
        return "failed", str(ended.get("why", ""))
    all_done = steps and train_iters is not None and int(steps[-1][ITERATION]) >= train_iters
    if outcome == "done" or (outcome is None and all_done):
        return "finished", "all iterations are done"
    if ends and ends[-1].get("requeued"):
        return "requeued", f"waiting in Slurm's queue: {ends[-1].get('why')}"
    return "stopped", str(ends[-1].get("why")) if ends else "the save folder was released"


def _last_end(records: list[JsonRecord]) -> JsonRecord | None:
    """Return the event with which the last process ended; None if it was killed."""
    for record in reversed(records):
        if record.get(EVENT) == "end":
            return record
        if record.get(EVENT) == "start":
            return None
    return None


def _log_interval_seconds(steps: list[JsonRecord]) -> float:
    """Return the seconds between the last two log lines."""
    between = int(steps[-1][ITERATION]) - int(steps[-2][ITERATION]) if len(steps) > 1 else 1
    return max(1, between) * float(steps[-1].get(SECONDS_PER_ITERATION.name) or 0.0)


def _validation_losses(records: list[JsonRecord]) -> dict[str, float]:
    """Return the last loss of each validation set in the records."""
    return {
        name: float(record[key])
        for record in records
        for key, name in VALIDATION_LOSS.names(record).items()
        if isinstance(record[key], int | float)
    }


def _last_exceptional_event(records: list[JsonRecord]) -> str | None:
    for record in reversed(records):
        if record.get(EVENT) not in (None, *ROUTINE_EVENTS):
            return f"{record[EVENT]} at iteration {record[ITERATION]}: {record.get('why', '')}"
    return None
