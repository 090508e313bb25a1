"""The status of a run, read from its save folder: progress, throughput, liveness, errors."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint import manifest, run_lock
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.errors import UserError
from megatron_llmjp.interval_stats import SLOW_SHARE
from megatron_llmjp.metric_registry import (
    CONSUMED_SAMPLES,
    CONSUMED_TOKENS,
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
    SLOWEST_HOST,
    SLOWEST_RANK,
    STRAGGLER_SHARE,
    TFLOPS_PER_GPU,
    TOKENS_PER_SECOND,
    TOTAL_NAN,
    TOTAL_SKIPPED,
    TOTAL_SPIKES,
)
from megatron_llmjp.report.exclusions import read_exclusions
from megatron_llmjp.report.history import MAX_NUMBER, JsonRecord
from megatron_llmjp.report.jobs import (
    SEARCHED_JOBS,
    Incident,
    JobFolder,
    deciding_job,
    excluded_nodes,
    find_end,
    find_errors,
    job_folders,
    last_hang,
    preflight_failure,
    read_job_ends,
    without_rejected,
)
from megatron_llmjp.report.json_lines import json_values
from megatron_llmjp.report.metrics_tail import RecentMetrics, read_recent_metrics
from megatron_llmjp.report.run_state import (
    Evidence,
    JobEvidence,
    ProcessEvidence,
    State,
    find_state,
)
from megatron_llmjp.report.slurm_queue import QueuedJob, read_queue
from megatron_llmjp.report.step_times import compared_step_rows
from megatron_llmjp.yaml_text import read_yaml

CONSTANT_BATCH_SIZE = "rampup_batch_size: null"
"""Line of the configuration of a run without batch size ramp-up."""
READERS = 16
"""Number of runs read at the same time: on a network file system, reading is mostly waiting."""


@dataclass(frozen=True)
class SavedCheckpoints:
    """The checkpoints of a run."""

    iterations: list[int]
    bytes: int | None
    """Size of the newest checkpoint; 0 if it is damaged, None without details."""
    seconds_ago: float
    """Age of the newest checkpoint."""


@dataclass(frozen=True)
class RunStatus:
    """Status of a run; None for unknown values."""

    folder: str
    state: State
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
    excluded: dict[str, str] = field(default_factory=dict)
    """Reason of each node that the run excluded."""
    error: Incident | None = None
    rejected: Incident | None = None
    """Error of a job that was rejected before it held the save folder."""
    hang: Incident | None = None
    compared: dict[str, str] = field(default_factory=dict)
    """Measured and predicted times of the last log interval, by what they are of."""
    slow: str | None = None
    """Slowest rank of the last log interval and its host, if others wait long for it."""
    event: str | None = None
    """Last exceptional event near the end of the metrics, such as a bad step."""


def read_statuses(folders: Sequence[Path], details: bool) -> list[RunStatus | UserError]:
    """Read the status of several runs at the same time, with one request to Slurm.

    Args:
        folders: the save folders.
        details: as for :func:`read_status`.

    Returns:
        By folder, the status, or the error of a folder that has no run.
    """
    with ThreadPoolExecutor(READERS) as readers:
        queue = read_queue(set().union(*readers.map(_newest_jobs, folders)))
        return list(readers.map(partial(_read_or_explain, queue=queue, details=details), folders))


def _newest_jobs(folder: Path) -> set[str]:
    return {job.job for job in job_folders(folder)[:SEARCHED_JOBS]}


def _read_or_explain(
    folder: Path, queue: Mapping[str, QueuedJob], details: bool
) -> RunStatus | UserError:
    try:
        return read_status(folder, queue, details)
    except UserError as error:
        return error


def read_status(
    folder: Path, queue: Mapping[str, QueuedJob] | None = None, details: bool = True
) -> RunStatus:
    """Read the status of a run; write nothing.

    Args:
        folder: the save folder.
        queue: Slurm's queue; read for this run if None.
        details: whether to read what a table of runs does not show: the size of the newest
            checkpoint, the number of folds, and the logs of a run that has no problem.

    Raises:
        UserError: the folder is not the save folder of a run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist")
    saved, owner = _saved_checkpoints(folder, details), run_lock.read_owner(folder)
    ends, jobs = read_job_ends(folder), job_folders(folder)
    metrics = folder / METRICS_FILE
    if not (metrics.exists() or saved or owner or ends or jobs):
        raise UserError(
            f"{folder} is not the save folder of a run: it has no {METRICS_FILE}, no checkpoint "
            "and no run in progress; expected the folder given to the run as --save"
        )
    recent = read_recent_metrics(folder)
    age = time.time() - metrics.stat().st_mtime if metrics.exists() else None
    if queue is None:
        queue = read_queue({job.job for job in jobs[:SEARCHED_JOBS]})
    job = deciding_job(jobs, ends, queue)
    status = replace(
        _progress(folder, recent, saved, details), seconds_since_log=age, saved=saved, ends=ends
    )
    state, why = find_state(
        Evidence(
            process=_process(folder, owner, recent, age),
            job=_job(job, ends, queue) if job is not None else None,
            end=recent.end,
            job_end=next(reversed(without_rejected(ends)), None),
            all_done=_all_done(status, recent),
        )
    )
    excluded = excluded_nodes(ends) | {one.node: one.reason for one in read_exclusions(folder)}
    status = replace(status, state=state, why=why, excluded=excluded)
    if details or state in ("failed", "dead", "stalled"):
        error, rejected = find_errors(folder, jobs, ends)
        status = replace(status, error=error, rejected=rejected, hang=last_hang(folder))
    return status


def status_json(status: RunStatus) -> dict[str, Any]:
    """Return a status as JSON; infinities and NaN, which JSON lacks, become null."""
    plain = json_values(asdict(status))
    assert isinstance(plain, dict)
    return plain


def _progress(
    folder: Path, recent: RecentMetrics, saved: SavedCheckpoints | None, details: bool
) -> RunStatus:
    """Return what the metrics say about a run."""
    last, restarted = recent.last, recent.restarted_at
    return RunStatus(
        folder=str(folder),
        state="stopped",
        why="",
        iteration=restarted if restarted is not None else _count(last, ITERATION),
        train_iters=_train_iters(folder, last, saved),
        skipped=_count(last, TOTAL_SKIPPED.name),
        nan=_count(last, TOTAL_NAN.name),
        spikes=_count(last, TOTAL_SPIKES.name),
        rollbacks=_count(last, ROLLBACKS.name),
        fold=last.get(FOLD),
        fold_number=_to_int(last.get(FOLD_NUMBER.name)),
        folds=_folds(folder, saved) if details else None,
        fold_progress=last.get(FOLD_PROGRESS.name),
        consumed_tokens=_to_int(last.get(CONSUMED_TOKENS.name)),
        loss=last.get(LM_LOSS.name),
        validation=recent.validation,
        tokens_per_second=last.get(TOKENS_PER_SECOND.name),
        tflops_per_gpu=last.get(TFLOPS_PER_GPU.name),
        mfu=last.get(MFU.name),
        seconds_per_iteration=last.get(SECONDS_PER_ITERATION.name),
        seconds_remaining=last.get(SECONDS_REMAINING.name),
        compared=dict(compared_step_rows(last)),
        slow=_slow_rank(last),
        event=recent.exception,
    )


def _process(
    folder: Path, owner: run_lock.Owner | None, recent: RecentMetrics, age: float | None
) -> ProcessEvidence | None:
    if owner is None:
        return None
    started, logged = owner.started_at, time.time() - age if age is not None else -math.inf
    return ProcessEvidence(
        name=str(owner),
        is_alive=run_lock.is_owner_alive(folder, owner),
        has_logged=bool(recent.steps)
        and recent.restarted_at is None
        and (started is None or logged >= started),
        seconds_since_log=age,
        log_interval_seconds=recent.log_interval_seconds,
    )


def _job(
    job: JobFolder, ends: Sequence[dict[str, Any]], queue: Mapping[str, QueuedJob]
) -> JobEvidence:
    return JobEvidence(
        job=job.job,
        has_started_ranks=job.has_started_ranks(),
        has_trained=job.has_trained(),
        logs_created_at=job.modified_at,
        queued=queue.get(job.job),
        preflight_failure=preflight_failure(job),
        has_ended=find_end(job, ends) is not None,
    )


def _all_done(status: RunStatus, recent: RecentMetrics) -> bool:
    if not recent.steps or recent.restarted_at is not None or status.train_iters is None:
        return False
    return status.iteration >= status.train_iters


def _slow_rank(record: JsonRecord) -> str | None:
    """Return the slowest rank of a log interval and its host if others wait long for it."""
    rank, share = record.get(SLOWEST_RANK.name), record.get(STRAGGLER_SHARE.name)
    if rank is None or share is None or share < SLOW_SHARE:
        return None
    host = record.get(SLOWEST_HOST)
    return f"rank {int(rank)} on {host}: others wait for it for {share:.0%} of an iteration"


def _count(record: JsonRecord, name: str) -> int:
    """Return a value of a record as an integer; 0 if it is missing or null."""
    return int(record.get(name) or 0)


def _to_int(number: float | None) -> int | None:
    return None if number is None else int(number)


def _saved_checkpoints(folder: Path, details: bool) -> SavedCheckpoints | None:
    iterations = manifest.complete_iterations(folder)
    if not iterations:
        return None
    newest = folder / manifest.folder_name(iterations[-1])
    try:
        files = manifest.read_manifest(newest).files if details else None
        size = sum(entry.bytes for entry in files.values()) if files is not None else None
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
    config = _growing_batch_config(folder, saved)
    if config is None:
        return int(last[ITERATION]) + round(remaining)
    consumed, batch_size = last.get(CONSUMED_SAMPLES), last.get(GLOBAL_BATCH_SIZE.name)
    if consumed is None or batch_size is None:
        return None
    samples = consumed + round(remaining * batch_size)
    return BatchSizeSchedule(config).iterations(samples)[0]


def _growing_batch_config(folder: Path, saved: SavedCheckpoints | None) -> Config | None:
    """Return the configuration of the newest checkpoint if its batch size grows."""
    if saved is None:
        return None
    path = folder / manifest.folder_name(saved.iterations[-1]) / manifest.CONFIG
    try:
        # Parsing the file takes most of the time of a table of runs; few runs need it.
        if CONSTANT_BATCH_SIZE in path.read_text(encoding="utf-8"):
            return None
        return load_config(path)
    except (UserError, OSError, UnicodeDecodeError):
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
