"""Outputs of metrics: log line, ``metrics.jsonl``, TensorBoard, Weights & Biases.

Tensorboard's event files, written by the thread that asks for it.

torch's ``SummaryWriter`` writes in a thread that ends at the first error, such as a full disk, and
the training with it at the next number.

What a person reads in the log, in Megatron-LM's words and order where it has them.

Where metrics are written: ``metrics.jsonl``, tensorboard events, Weights & Biases.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar, text

from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import warn, write_atomically
from megatron_llmjp.formatting import format_count, format_duration
from megatron_llmjp.retrying_file import RetryingFile

VERSION = "brain.Event:2"
"""Of the format, as tensorboard knows it."""
_numbers = itertools.count()


class EventFile:
    """One event file; several of a folder are shown as one."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begin at ``first_step``: earlier files' records of it and later ones do not hold."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        self._file = RetryingFile(folder / f"{name}.{os.getpid()}.{next(_numbers)}")
        self._add(0, file_version=VERSION)
        self._add(first_step, file_version=VERSION)
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a number."""
        self._add(step, summary=scalar(name, value))

    def add_text(self, name: str, contents: str, step: int) -> None:
        """Add a text, as Markdown."""
        self._add(step, summary=text(name, contents))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, step: int, **what: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **what)
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.write(record.getvalue())  # at once: a part of a record ends the file for readers


def interval_line(
    iteration: int, train_iters: int, consumed: int, values: Mapping[str, float], fold: str
) -> str:
    """One interval in one line; values that are not known are omitted.

    So is the loss of an interval in which no step had one, as in Megatron-LM's log.
    """
    parts = [
        f"iteration {iteration:8d}/{train_iters:8d}",
        f"consumed samples: {consumed:12d}",
        f"consumed tokens: {format_count(values['consumed tokens'])}",
        f"elapsed time per iteration (ms): {values['seconds per iteration'] * 1000:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {values['TFLOP/s per GPU']:.1f}",
        _if_known("MFU: {:.1%}", values.get("MFU")),
        f"tokens/s: {format_count(values['tokens per second'])}",
        f"learning rate: {values['learning rate']:.6E}",
        f"global batch size: {values['global batch size']:5d}",
        _if_known("lm loss: {:.6E}", values["lm loss"]),
        _if_known("z loss: {:.6E}", values.get("z loss")),
        f"loss scale: {values['loss scale']:.1f}",
        f"grad norm: {values['grad norm']:.3f}",
        _if_known("params norm: {:.3f}", values.get("params norm")),
        f"number of skipped iterations: {values['skipped iterations']:3d}",
        f"number of nan iterations: {values['nan iterations']:3d}",
        _if_not_zero("number of spikes: {:3d}", values.get("spikes")),
        _if_not_zero("number of rollbacks: {:3d}", values.get("rollbacks")),
        f"fold: {fold}",
        f"remaining: {format_duration(values['seconds remaining'])}",
    ]
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    return f" [{now}] {' | '.join(part for part in parts if part)} |"


def _if_known(form: str, value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else form.format(value)


def _if_not_zero(form: str, value: float | None) -> str:
    return form.format(value) if value else ""


METRICS = "metrics.jsonl"
WANDB = "WeightsAndBiases"
WANDB_RUN = "wandb_run_id.txt"


@dataclass(frozen=True)
class Record:
    """What is known after an iteration."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    values: Mapping[str, float] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    """What is no number: the fold's name, or an ``event``."""


class Writer(Protocol):
    """A place that metrics are written to, on the first rank."""

    def write(self, record: Record) -> None:
        """Add a record."""

    def close(self) -> None:
        """Write out what is pending."""


class Writers:
    """All places that a run writes to.

    A run that goes on from a checkpoint adds to what is there: an event ``start`` tells where it
    began, and of two records of one iteration the later one holds.
    """

    def __init__(self, config: Config) -> None:
        save = config.checkpoint.save
        self._places: list[Writer] = []
        self._failed: set[str] = set()
        if save is not None:
            self._places.append(JsonLines(Path(save) / METRICS))
        events = config.logging.tensorboard_dir or (save and str(Path(save) / "tensorboard"))
        if events:
            self._places.append(Tensorboard(events, config))
        if config.logging.wandb_project:
            self._attempt(WANDB, lambda: self._places.append(WeightsAndBiases(config)))

    def write(self, record: Record) -> None:
        """Add a record everywhere."""
        for place in self._places:
            self._attempt(type(place).__name__, partial(place.write, record))

    def close(self) -> None:
        """Write out what is pending."""
        for place in self._places:
            self._attempt(type(place).__name__, place.close)

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        """Act, and warn once of what fails: a log never ends a run.

        Raises:
            UserError: a requested destination is not available.
        """
        try:
            action()
        except UserError:
            raise
        except Exception as error:  # libraries raise anything when a disk or a network fails
            if name not in self._failed:
                warn(f"{name}: {type(error).__name__}: {error}; the run continues without its log")
            self._failed.add(name)
        else:
            self._failed.discard(name)


class JsonLines:
    """One JSON object a line; all records, events too."""

    def __init__(self, path: Path) -> None:
        self._file = RetryingFile(path)
        if not _ends_a_line(path):  # the run before was killed, or out of disk
            self._file.write(b"\n")

    def write(self, record: Record) -> None:
        """Add a line at once: a run may end at any time. JSON has no NaN: it becomes null."""
        place = {"iteration": record.iteration, "consumed samples": record.consumed_samples}
        numbers = {k: v if math.isfinite(v) else None for k, v in record.values.items()}
        entry = {**place, **numbers, **record.words}
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        self._file.write(text.encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _ends_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 1))
            return stream.read(1) in (b"", b"\n")
    except OSError:
        return True


class Tensorboard:
    """Scalars against iterations and, in the folder ``vs_tokens``, against tokens.

    Two folders, because what was written past a checkpoint is taken back by its step.
    """

    def __init__(self, folder: str, config: Config) -> None:
        self._folder = Path(folder)
        self._config = config
        self._start: Record | None = None
        self._by_iteration: Any = None
        self._by_tokens: Any = None

    def write(self, record: Record) -> None:
        """Add the record's numbers; the first record tells where the run goes on."""
        self._start = self._start or record
        if record.values and self._by_iteration is None:
            self._open(self._start)
        for name, value in record.values.items():
            self._by_iteration.add_scalar(name, value, record.iteration)
            self._by_tokens.add_scalar(name, value, record.consumed_tokens)

    def close(self) -> None:
        """Write out what is pending."""
        if self._by_iteration is not None:
            self._by_iteration.close()
            self._by_tokens.close()

    def _open(self, start: Record) -> None:
        """With the first numbers: the import is slow and start-up should not be."""

        self._by_iteration = EventFile(self._folder, start.iteration + 1)
        self._by_tokens = EventFile(self._folder / "vs_tokens", start.consumed_tokens + 1)
        self._by_iteration.add_text(
            "config", f"```yaml\n{dump_config(self._config)}```", start.iteration
        )


class WeightsAndBiases:
    """The same records on wandb.ai, or offline with ``WANDB_MODE=offline``.

    A run that goes on keeps its page there: the page's id lies in the save folder.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"--wandb-project {config.logging.wandb_project}: wandb is not installed: "
                "`pip install wandb`, or leave the flag out"
            ) from error
        save = config.checkpoint.save
        self._run = wandb.init(
            project=config.logging.wandb_project,
            entity=config.logging.wandb_entity,
            name=config.logging.wandb_exp_name or (Path(save).name if save else None),
            dir=save,
            id=_run_id(Path(save)) if save else None,
            resume="allow",
            config=config.model_dump(mode="json"),
        )
        # Its own step only grows; after a restart iterations are written again.
        self._run.define_metric("iteration")
        self._run.define_metric("consumed tokens")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, record: Record) -> None:
        """Send the record's numbers."""
        if record.values:
            place = {"iteration": record.iteration, "consumed tokens": record.consumed_tokens}
            self._run.log({**place, **record.values})

    def close(self) -> None:
        """Send what is pending."""
        self._run.finish()


def _run_id(save: Path) -> str:
    """The id of the run's page, which its restarts share."""
    file = save / WANDB_RUN
    known = file.read_text().strip() if file.exists() else ""
    if not known:
        known = uuid.uuid4().hex[:12]
        write_atomically(file, known)
    return known
