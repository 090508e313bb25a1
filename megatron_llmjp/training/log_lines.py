"""Log lines of training in three formats: Megatron-LM's, short ones for a terminal, and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from megatron_llmjp.config.logging_config import LogFormat
from megatron_llmjp.formatting import format_count, format_duration, shorten, text_width
from megatron_llmjp.metric_registry import (
    CONSUMED_SAMPLES,
    FOLD,
    GRAD_NORM,
    ITERATION,
    LEARNING_RATE,
    LM_LOSS,
    MFU,
    NAN_ITERATIONS,
    PERPLEXITY,
    ROLLBACKS,
    SECONDS_REMAINING,
    SKIPPED_ITERATIONS,
    SPIKES,
    TFLOPS_PER_GPU,
    TOKENS_PER_SECOND,
    VALIDATION_LOSS,
    format_tflops,
    log_line_parts,
    perplexity,
)

SHORT_COLUMNS = 120
"""Largest width of a short line."""
FOLD_COLUMNS = 24
"""Width of the name and progress of a fold that less important parts make room for."""
_STDOUT = 1


@dataclass(frozen=True)
class FoldPosition:
    """Position of a run within its folds."""

    name: str
    number: int
    """From 1."""
    count: int
    progress: float
    """Fraction of the fold, from 0 to 1."""


def choose_format(configured: LogFormat | None) -> LogFormat:
    """Return the configured format; by default short in a terminal, Megatron-LM's elsewhere."""
    return configured or ("short" if os.isatty(_STDOUT) else "megatron")


@dataclass(frozen=True)
class LogLines:
    """Formats log lines.

    Args:
        format: their format.
        train_iters: planned number of iterations.
    """

    format: LogFormat
    train_iters: int

    def interval(
        self, iteration: int, consumed: int, values: Mapping[str, float], fold: FoldPosition
    ) -> str:
        """Return the line of a log interval.

        Args:
            iteration: last iteration of the interval.
            consumed: consumed samples.
            values: metrics by name; metrics without a value are omitted.
            fold: the current fold.
        """
        if self.format == "json":
            position = {ITERATION: iteration, "train_iters": self.train_iters}
            shown = {**position, CONSUMED_SAMPLES: consumed, **values, FOLD: fold.name}
            if not format_tflops(values.get(TFLOPS_PER_GPU.name, 0.0)):
                shown.pop(TFLOPS_PER_GPU.name, None)
            return _json_line(shown)
        if self.format == "short":
            return self._short(iteration, values, fold)
        parts = [
            f"iteration {iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {consumed:12d}",
            *log_line_parts(values),
            f"fold: {fold.name} ({fold.number}/{fold.count}) {fold.progress:.0%}",
            f"remaining: {format_duration(values[SECONDS_REMAINING.name])}",
        ]
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        return f" [{now}] {' | '.join(parts)} |"

    def validation(self, iteration: int, losses: Mapping[str, float]) -> str:
        """Return the line of a validation; a short one is continued after 120 columns."""
        if self.format == "json":
            shown = {VALIDATION_LOSS.key(name): loss for name, loss in losses.items()}
            shown |= {PERPLEXITY.key(name): perplexity(loss) for name, loss in losses.items()}
            return _json_line({ITERATION: iteration, **shown})
        if self.format == "short":
            sets = [f"{name} {loss:.4f}" for name, loss in losses.items()]
            head = f"{_clock()}  {self._position(iteration)}  validation loss"
            return "\n".join(_wrap(head, sets))
        parts = [
            f"{name} loss: {loss:.6E} | {name} PPL: {perplexity(loss):.6E}"
            for name, loss in losses.items()
        ]
        return f" validation at iteration {iteration} | {' | '.join(parts)} |"

    def _position(self, iteration: int) -> str:
        width = len(str(self.train_iters))
        return f"{iteration:{width}d}/{self.train_iters}"

    def _short(self, iteration: int, values: Mapping[str, float], fold: FoldPosition) -> str:
        """Return the most important metrics in 120 columns: less important ones make room."""
        required = [
            f"{_clock()}  {self._position(iteration)}",
            f"loss {values[LM_LOSS.name]:.4f}",
            *_anomalies(values),
        ]
        end = f"ETA {_remaining(values[SECONDS_REMAINING.name])}"
        optional = list(_optional_parts(values))
        progress = f" {fold.number}/{fold.count} {fold.progress:.0%}"
        needed = min(FOLD_COLUMNS, text_width(fold.name + progress))
        while True:
            parts = [*required, *optional, end]
            room = SHORT_COLUMNS - sum(text_width(part) + 2 for part in parts)
            if room >= needed or not optional:
                break
            optional.pop()
        if room > text_width(progress):
            parts.insert(-1, shorten(fold.name, room - text_width(progress)) + progress)
        return shorten("  ".join(parts), SHORT_COLUMNS)


def _remaining(seconds: float) -> str:
    """Return a duration; without its seconds from a day on."""
    text = format_duration(seconds)
    return text.rpartition(":")[0] if "d" in text else text


def _optional_parts(values: Mapping[str, float]) -> Iterator[str]:
    """Yield parts of a short line, the most important first."""
    if GRAD_NORM.name in values:
        norm = values[GRAD_NORM.name]
        yield f"grad {norm:.3f}" if abs(norm) < 1000 else f"grad {norm:.3g}"
    yield f"lr {values[LEARNING_RATE.name]:.2e}"
    yield f"{format_count(values[TOKENS_PER_SECOND.name])} tok/s"
    tflops = format_tflops(values.get(TFLOPS_PER_GPU.name, 0.0))
    if tflops:
        yield f"{tflops} TFLOP/s"
    if MFU.name in values and math.isfinite(values[MFU.name]):
        yield f"MFU {values[MFU.name]:.1%}"


def _anomalies(values: Mapping[str, float]) -> Iterator[str]:
    names = {"skipped": SKIPPED_ITERATIONS, "NaN": NAN_ITERATIONS, "spikes": SPIKES}
    for label, metric in {**names, "rollbacks": ROLLBACKS}.items():
        if values.get(metric.name):
            yield f"{label} {values[metric.name]:.0f}"


def _wrap(head: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield lines of at most 120 columns; the following ones are indented."""
    line = head
    for part in parts:
        if text_width(line) + 2 + text_width(part) > SHORT_COLUMNS and line.strip():
            yield line
            line = " " * 8
        line = shorten(f"{line}  {part}", SHORT_COLUMNS)
    yield line


def _json_line(values: Mapping[str, object]) -> str:
    """Return a JSON object with the time; NaN and Inf, which JSON does not have, become null."""
    numbers = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"time": now, **numbers}, ensure_ascii=False, allow_nan=False)


def _clock() -> str:
    return datetime.now().strftime("%H:%M:%S")
