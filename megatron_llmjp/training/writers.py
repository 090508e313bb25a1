"""Where metrics are written: ``metrics.jsonl``, tensorboard events, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_llmjp.config.load import dump
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.runtime.patient_file import PatientFile
from megatron_llmjp.system import warn, write_durably

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
        self._file = PatientFile(path)
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
        from megatron_llmjp.training.events import EventFile

        self._by_iteration = EventFile(self._folder, start.iteration + 1)
        self._by_tokens = EventFile(self._folder / "vs_tokens", start.consumed_tokens + 1)
        self._by_iteration.add_text("config", f"```yaml\n{dump(self._config)}```", start.iteration)


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
        write_durably(file, known)
    return known
