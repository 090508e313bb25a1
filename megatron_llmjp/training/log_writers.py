"""Destinations of metrics: log line, ``metrics.jsonl``, TensorBoard and Weights & Biases.

TensorBoard event files are written without torch's ``SummaryWriter``, whose thread exits at the
first error, such as a full disk, and then makes the next write fail in the training thread.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar, text

from megatron_llmjp.alerts.destinations import find_destinations
from megatron_llmjp.alerts.sender import AlertSender
from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import warn, write_atomically
from megatron_llmjp.metric_registry import (
    CONSUMED_SAMPLES,
    CONSUMED_TOKENS,
    EVENT,
    EXPERT_TOKENS,
    EXPERT_TOKENS_FILE,
    ITERATION,
    METRICS_FILE,
)
from megatron_llmjp.report.history import ROUTINE_EVENTS
from megatron_llmjp.retrying_file import RetryingFile
from megatron_llmjp.training.alerts import AlertWriter

EVENT_FILE_VERSION = "brain.Event:2"
"""Version of the event file format."""
EXPERT_TOKENS_SECONDS = 60.0
"""Least time between two writes of the tokens of each expert."""
_file_numbers = itertools.count()

WANDB_RUN_ID_FILE = "wandb_run_id.txt"


class TensorboardEventFile:
    """One event file; TensorBoard merges all event files of a folder."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Start a file that supersedes records of earlier files from ``first_step`` on."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        self._file = RetryingFile(folder / f"{name}.{os.getpid()}.{next(_file_numbers)}")
        self._add(0, file_version=EVENT_FILE_VERSION)
        self._add(first_step, file_version=EVENT_FILE_VERSION)
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a scalar."""
        self._add(step, summary=scalar(name, value))

    def add_text(self, name: str, contents: str, step: int) -> None:
        """Add a Markdown text."""
        self._add(step, summary=text(name, contents))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, step: int, **fields: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **fields)
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.write(record.getvalue())  # in one call: readers stop at a partial record


@dataclass(frozen=True)
class MetricsRecord:
    """Metrics or an event after an iteration."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    values: Mapping[str, float] = field(default_factory=dict)
    strings: Mapping[str, str] = field(default_factory=dict)
    """Fields that are not numbers, such as the name of the fold or an event."""
    expert_tokens: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Tokens of each expert in the log interval, by layer, from 1."""


class MetricsWriter(Protocol):
    """A destination of metrics on the first rank."""

    def write(self, record: MetricsRecord) -> None:
        """Add a record."""

    def close(self) -> None:
        """Flush and close."""


class MetricsWriters:
    """All destinations of a run's metrics.

    A resumed run appends to existing files: an event ``start`` gives the iteration that it resumed
    from, and of two records of the same iteration the later one is valid.
    """

    def __init__(self, config: Config) -> None:
        save = config.checkpoint.save
        self._writers: list[MetricsWriter] = []
        self._failed: set[str] = set()
        if save is not None:
            self._writers.append(JsonLinesWriter(Path(save) / METRICS_FILE))
            if config.model.has_experts:
                self._writers.append(ExpertTokensWriter(Path(save) / EXPERT_TOKENS_FILE))
        events = config.logging.tensorboard_dir or (save and str(Path(save) / "tensorboard"))
        if events:
            self._writers.append(TensorboardWriter(events, config))
        if config.logging.wandb_project:
            self._attempt(WandbWriter.__name__, lambda: self._writers.append(WandbWriter(config)))
        if destinations := find_destinations(config.logging):
            self._writers.append(AlertWriter(AlertSender(destinations), save))

    def write(self, record: MetricsRecord) -> None:
        """Write a record to all destinations."""
        for writer in self._writers:
            self._attempt(type(writer).__name__, partial(writer.write, record))

    def close(self) -> None:
        """Flush and close."""
        for writer in self._writers:
            self._attempt(type(writer).__name__, writer.close)

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        """Run an action; warn once if it fails, since logging must never end a run.

        Raises:
            UserError: a configured destination is not available.
        """
        try:
            action()
        except UserError:
            raise
        except Exception as error:  # libraries raise any exception when a disk or network fails
            if name not in self._failed:
                warn(f"{name}: {type(error).__name__}: {error}; the run continues without this log")
            self._failed.add(name)
        else:
            self._failed.discard(name)


class JsonLinesWriter:
    """Write all records, including events, as one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._file = RetryingFile(path)
        if not _ends_a_line(path):  # the previous run was killed, or its disk was full
            self._file.write(b"\n")

    def write(self, record: MetricsRecord) -> None:
        """Append a line, unbuffered. NaN and Inf, which JSON does not have, become null."""
        position = {ITERATION: record.iteration, CONSUMED_SAMPLES: record.consumed_samples}
        numbers = {k: v if math.isfinite(v) else None for k, v in record.values.items()}
        entry = {**position, **numbers, **record.strings}
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        self._file.write(text.encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ExpertTokensWriter:
    """Replace a file by the tokens of each expert, once a minute and at the end of the process.

    Those of all log intervals would take more space than the checkpoints of a large run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: MetricsRecord | None = None
        self._written_at = time.monotonic()

    def write(self, record: MetricsRecord) -> None:
        """Keep the counts of a record; write them if the last write is long enough ago."""
        if record.expert_tokens:
            self._pending = record
            if time.monotonic() - self._written_at >= EXPERT_TOKENS_SECONDS:
                self.close()

    def close(self) -> None:
        """Write the counts that are not in the file yet."""
        record, self._pending = self._pending, None
        self._written_at = time.monotonic()
        if record is not None:
            position = {ITERATION: record.iteration, CONSUMED_SAMPLES: record.consumed_samples}
            tokens = {str(layer): list(counts) for layer, counts in record.expert_tokens.items()}
            write_atomically(self._path, json.dumps({**position, EXPERT_TOKENS: tokens}) + "\n")


def _ends_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 1))
            return stream.read(1) in (b"", b"\n")
    except OSError:
        return True


class TensorboardWriter:
    """Write scalars by iteration and, in the folder ``vs_tokens``, by consumed tokens.

    They are two folders because TensorBoard discards superseded records by step. Events such as a
    straggler are texts.
    """

    def __init__(self, folder: str, config: Config) -> None:
        self._folder = Path(folder)
        self._config = config
        self._start: MetricsRecord | None = None
        self._by_iteration: Any = None
        self._by_tokens: Any = None

    def write(self, record: MetricsRecord) -> None:
        """Add the metrics of a record; the first record marks the start of the run."""
        self._start = self._start or record
        kind = record.strings.get(EVENT)
        is_exceptional = kind is not None and kind not in ROUTINE_EVENTS
        if (record.values or is_exceptional) and self._by_iteration is None:
            self._open(self._start)
        if kind is not None and is_exceptional:
            self._by_iteration.add_text(kind, record.strings.get("why", ""), record.iteration)
        for name, value in record.values.items():
            self._by_iteration.add_scalar(name, value, record.iteration)
            self._by_tokens.add_scalar(name, value, record.consumed_tokens)

    def close(self) -> None:
        """Flush and close."""
        if self._by_iteration is not None:
            self._by_iteration.close()
            self._by_tokens.close()

    def _open(self, start: MetricsRecord) -> None:
        """Create the event files, with the first metrics."""
        self._by_iteration = TensorboardEventFile(self._folder, start.iteration + 1)
        self._by_tokens = TensorboardEventFile(
            self._folder / "vs_tokens", start.consumed_tokens + 1
        )
        self._by_iteration.add_text(
            "config", f"```yaml\n{dump_config(self._config)}```", start.iteration
        )


class WandbWriter:
    """Send records to Weights & Biases, or write them locally with ``WANDB_MODE=offline``.

    A resumed run continues the same W&B run, whose id is stored in the save folder.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"--wandb-project {config.logging.wandb_project}: wandb is not installed: "
                "`pip install wandb`, or omit the flag"
            ) from error
        save = config.checkpoint.save
        self._run = wandb.init(
            project=config.logging.wandb_project,
            entity=config.logging.wandb_entity,
            name=config.logging.wandb_exp_name or (Path(save).name if save else None),
            dir=save,
            id=_wandb_run_id(Path(save)) if save else None,
            resume="allow",
            config=config.model_dump(mode="json"),
        )
        # The step of W&B cannot decrease, but a resumed run may repeat iterations.
        self._run.define_metric(ITERATION)
        self._run.define_metric(CONSUMED_TOKENS.name)
        self._run.define_metric("*", step_metric=ITERATION)

    def write(self, record: MetricsRecord) -> None:
        """Send the metrics of a record."""
        if record.values:
            position = {ITERATION: record.iteration, CONSUMED_TOKENS.name: record.consumed_tokens}
            self._run.log({**position, **record.values})

    def close(self) -> None:
        """Send pending records and close."""
        self._run.finish()


def _wandb_run_id(save: Path) -> str:
    """Return the W&B run id, which restarts share; create it if necessary."""
    file = save / WANDB_RUN_ID_FILE
    run_id = file.read_text().strip() if file.exists() else ""
    if not run_id:
        run_id = uuid.uuid4().hex[:12]
        write_atomically(file, run_id)
    return run_id
