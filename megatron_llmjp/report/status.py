"""How a run is: far, fast, alive, in trouble. Read from its save folder, of which nothing changes.

Only the end of the metrics is read, so that a run of a million iterations is told at once.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_llmjp.checkpoint import manifest, run_lock
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.errors import UserError
from megatron_llmjp.report.history import (
    LM_LOSS,
    METRICS_FILE,
    ROUTINE_EVENTS,
    VALIDATION_PREFIX,
    JsonRecord,
    parse_record,
)
from megatron_llmjp.report.jobs import Incident, last_error, last_hang, read_job_ends, tail

TAIL_BYTES = 1 << 20
"""Some hundred records."""
STALL_SECONDS = 120.0
STALL_INTERVALS = 10
"""A living run that logs nothing for so many intervals, and for that long, stands still."""


@dataclass(frozen=True)
class SavedCheckpoints:
    """The checkpoints of a run."""

    iterations: list[int]
    bytes: int
    """Of the newest."""
    seconds_ago: float


@dataclass(frozen=True)
class RunStatus:
    """A run as its save folder tells it; None for what is not known."""

    folder: str
    state: str
    """running, still, starting, finished, stopped, requeued, failed or dead."""
    why: str
    iteration: int = 0
    skipped: int = 0
    """Steps that were not applied so far."""
    nan: int = 0
    """Of these, those with a NaN or Inf."""
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
    """Ends of its Slurm jobs, oldest first."""
    error: Incident | None = None
    hang: Incident | None = None
    event: str | None = None
    """The last exceptional one near the end, such as a bad step."""


def read_status(folder: Path) -> RunStatus:
    """Look at a run.

    Raises:
        UserError: the folder is not one that a run saves to.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
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
    steps = [record for record in records if LM_LOSS in record]
    last = steps[-1] if steps else {}
    age = time.time() - metrics.stat().st_mtime if metrics.exists() else None
    total = _train_iters(folder, last, saved)
    begun = _restarted_at(records)
    steps = [] if begun is not None else steps
    state, why = _state(folder, owner, steps, total, age, ends, _last_end(records))
    return RunStatus(
        folder=str(folder),
        state=state,
        why=why,
        iteration=begun if begun is not None else int(last.get("iteration", 0)),
        train_iters=total,
        skipped=int(last.get("total skipped iterations", 0)),
        nan=int(last.get("total nan iterations", 0)),
        spikes=int(last.get("total spikes", 0)),
        rollbacks=int(last.get("rollbacks", 0)),
        fold=last.get("fold"),
        fold_number=_to_int(last.get("fold number")),
        folds=_folds(folder, saved),
        fold_progress=last.get("fold progress"),
        consumed_tokens=_to_int(last.get("consumed tokens")),
        loss=last.get(LM_LOSS),
        validation=_validation_losses(records),
        tokens_per_second=last.get("tokens per second"),
        tflops_per_gpu=last.get("TFLOP/s per GPU"),
        mfu=last.get("MFU"),
        seconds_per_iteration=last.get("seconds per iteration"),
        seconds_remaining=last.get("seconds remaining"),
        seconds_since_log=age,
        saved=saved,
        ends=ends,
        error=error,
        hang=hang,
        event=_last_exceptional_event(records),
    )


def _restarted_at(records: list[JsonRecord]) -> int | None:
    """The iteration that a process went on from, where it has not logged a step yet."""
    for record in reversed(records):
        if LM_LOSS in record:
            return None
        if record.get("event") == "start":
            return int(record["iteration"])
    return None


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
    except (UserError, OSError):  # damaged, or removed meanwhile
        return SavedCheckpoints(iterations, 0, math.nan)
    return SavedCheckpoints(iterations, size, age)


def _train_iters(folder: Path, last: JsonRecord, saved: SavedCheckpoints | None) -> int | None:
    """The run's length, from what remains; with a growing batch the configuration tells more."""
    remaining, each = last.get("seconds remaining"), last.get("seconds per iteration")
    if remaining is None or not each:
        return None
    left = remaining / each
    try:
        assert saved is not None
        newest = folder / manifest.folder_name(saved.iterations[-1])
        config = load_config(newest / manifest.CONFIG)
    except (AssertionError, UserError, OSError):
        return int(last["iteration"]) + round(left)
    samples = last["consumed samples"] + round(left * last["global batch size"])
    return BatchSizeSchedule(config).iterations(samples)[0]


def _folds(folder: Path, saved: SavedCheckpoints | None) -> int | None:
    """How many folds the run has, by the copy of its fold file."""
    if saved is None:
        return None
    copy = folder / manifest.folder_name(saved.iterations[-1]) / manifest.FOLDS
    try:
        return len(yaml.safe_load(copy.read_text(encoding="utf-8"))["folds"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None


def _state(
    folder: Path,
    owner: run_lock.Owner | None,
    steps: list[JsonRecord],
    total: int | None,
    age: float | None,
    ends: list[dict[str, Any]],
    ended: JsonRecord | None,
) -> tuple[str, str]:
    """One word for the run, and what it is said for."""
    if owner is not None:
        if not run_lock.is_owner_alive(folder, owner):
            return "dead", f"{owner} ended without a word, or its machine did"
        if not steps or age is None:
            return "starting", str(owner)
        if age > max(STALL_SECONDS, STALL_INTERVALS * _log_interval_seconds(steps)):
            return "still", f"{owner} lives, but logs nothing"
        return "running", str(owner)
    outcome = ended.get("outcome") if ended is not None else None
    if ended is not None and outcome == "failed":
        return "failed", str(ended.get("why", ""))
    all_done = steps and total is not None and int(steps[-1]["iteration"]) >= total
    if outcome == "done" or (outcome is None and all_done):
        return "finished", "all iterations are done"
    if ends and ends[-1].get("requeued"):
        return "requeued", f"waits in Slurm's queue: {ends[-1].get('why')}"
    return "stopped", str(ends[-1].get("why")) if ends else "it gave its folder back"


def _last_end(records: list[JsonRecord]) -> JsonRecord | None:
    """How the last process ended, where it could say so."""
    for record in reversed(records):
        if record.get("event") == "end":
            return record
        if record.get("event") == "start":
            return None
    return None


def _log_interval_seconds(steps: list[JsonRecord]) -> float:
    """Seconds between the last two lines of the log."""
    between = int(steps[-1]["iteration"]) - int(steps[-2]["iteration"]) if len(steps) > 1 else 1
    return max(1, between) * float(steps[-1].get("seconds per iteration", 0.0))


def _validation_losses(records: list[JsonRecord]) -> dict[str, float]:
    """The last loss of each set that the end of the log knows."""
    return {
        key.removeprefix(VALIDATION_PREFIX): float(value)
        for record in records
        for key, value in record.items()
        if key.startswith(VALIDATION_PREFIX) and isinstance(value, int | float)
    }


def _last_exceptional_event(records: list[JsonRecord]) -> str | None:
    for record in reversed(records):
        if record.get("event") not in (None, *ROUTINE_EVENTS):
            return f"{record['event']} at iteration {record['iteration']}: {record.get('why', '')}"
    return None
