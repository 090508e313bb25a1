"""The status of runs as text: one run as a list of fields, several as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_llmjp.errors import EXIT_DONE
from megatron_llmjp.formatting import format_bytes, format_count, format_duration, format_table
from megatron_llmjp.metric_registry import format_tflops
from megatron_llmjp.report.jobs import Incident, format_excluded
from megatron_llmjp.report.run_state import EXIT_CODES
from megatron_llmjp.report.status import RunStatus


def format_status(status: RunStatus) -> str:
    """Return the known fields of a run, one per line."""
    rows = [
        ("run", status.folder),
        ("state", f"{status.state}: {status.why}"),
        ("iteration", _iteration(status)),
        ("fold", _fold(status)),
        ("loss", _loss(status)),
        ("not applied", _not_applied(status)),
        ("speed", _speed(status)),
        *status.compared.items(),
        ("remaining", _remaining(status)),
        ("checkpoints", _checkpoints(status)),
        ("job ends", _ends(status)),
        ("excluded", format_excluded(status.excluded)),
        ("last error", _incident(status.error)),
        ("rejected job", _incident(status.rejected)),
        ("last hang", _incident(status.hang)),
        ("slow", status.slow or ""),
        ("last event", status.event or ""),
    ]
    return format_table([row for row in rows if row[1]], right=())


def format_statuses(runs: Sequence[RunStatus]) -> str:
    """Return a table with one line per run."""
    numbers = ("tokens/s", "remaining", "saved")
    heads = ("run", "state", "iteration", "fold", "loss", *numbers, "problem")
    return format_table([heads, *map(_row, runs)], right=(2, 4, 5, 6, 7))


def _row(status: RunStatus) -> tuple[str, ...]:
    total = f"/{status.train_iters:,}" if status.train_iters else ""
    saved = f"{status.saved.iterations[-1]:,}" if status.saved else "none"
    fold = ""
    if status.fold is not None:
        fold = f"{status.fold} {status.fold_progress or 0:.0%}"
    return (
        Path(status.folder).resolve().name,
        status.state,
        f"{status.iteration:,}{total}",
        fold,
        "" if status.loss is None else f"{status.loss:.4f}",
        "" if status.tokens_per_second is None else format_count(status.tokens_per_second),
        "" if not status.seconds_remaining else format_duration(status.seconds_remaining),
        saved,
        _problem(status)[:60],
    )


def _problem(status: RunStatus) -> str:
    """Return what a person should know about the run; empty for a healthy one."""
    if status.error is not None and EXIT_CODES[status.state] != EXIT_DONE:
        return status.error.what
    return "" if EXIT_CODES[status.state] == EXIT_DONE else status.why


def _iteration(status: RunStatus) -> str:
    text = f"{status.iteration:,}"
    if status.train_iters:
        text += f" of {status.train_iters:,} ({status.iteration / status.train_iters:.1%})"
    if status.consumed_tokens is not None:
        text += f", {format_count(status.consumed_tokens)} tokens"
    return text


def _fold(status: RunStatus) -> str:
    if status.fold is None:
        return ""
    number = f" ({status.fold_number}" if status.fold_number else ""
    number += f" of {status.folds})" if number and status.folds else ")" if number else ""
    return f"{status.fold}{number}, {status.fold_progress or 0:.0%} done"


def _loss(status: RunStatus) -> str:
    parts = [] if status.loss is None else [f"{status.loss:.4f}"]
    parts += [f"validation {name} {loss:.4f}" for name, loss in status.validation.items()]
    return ", ".join(parts)


def _not_applied(status: RunStatus) -> str:
    """Return the number of steps that were not applied and the reasons; empty without any."""
    parts = [
        (status.nan, "with a NaN or Inf"),
        (status.spikes, "spikes"),
        (status.rollbacks, "rollbacks"),
    ]
    known = ", ".join(f"{number:,} {cause}" for number, cause in parts if number)
    if not known and not status.skipped:
        return ""
    return f"{status.skipped:,} steps so far" + (f"; {known}" if known else "")


def _speed(status: RunStatus) -> str:
    if status.tokens_per_second is None:
        return ""
    parts = [f"{format_count(status.tokens_per_second)} tokens/s"]
    if tflops := format_tflops(status.tflops_per_gpu or 0.0):
        parts.append(f"{tflops} TFLOP/s per GPU")
    if status.mfu is not None:
        parts.append(f"MFU {status.mfu:.1%}")
    if status.seconds_per_iteration is not None:
        parts.append(f"{status.seconds_per_iteration:.2f} s per iteration")
    return ", ".join(parts)


def _remaining(status: RunStatus) -> str:
    if status.state == "finished" or status.seconds_remaining is None:
        return ""
    text = format_duration(status.seconds_remaining)
    if status.seconds_since_log is not None:
        text += f"; last log line {format_duration(status.seconds_since_log)} ago"
    return text


def _checkpoints(status: RunStatus) -> str:
    saved = status.saved
    if saved is None:
        return "none yet"
    if not saved.bytes:
        return f"{len(saved.iterations)}; the newest, {saved.iterations[-1]:,}, is damaged"
    newest = ", ".join(f"{iteration:,}" for iteration in reversed(saved.iterations[-3:]))
    return (
        f"{newest} (of {len(saved.iterations):,}); the newest has {format_bytes(saved.bytes)} "
        f"and is {format_duration(saved.seconds_ago)} old"
    )


def _ends(status: RunStatus) -> str:
    if not status.ends:
        return ""
    last = status.ends[-1]
    return (
        f"{len(status.ends)}, the last on {last.get('time')} with exit code "
        f"{last.get('exit code')} at iteration {last.get('iteration')}: {last.get('why')}"
    )


def _incident(incident: Incident | None) -> str:
    if incident is None:
        return ""
    return f"{format_duration(incident.seconds_ago)} ago: {incident.what} ({incident.where})"
