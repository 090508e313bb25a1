"""Tensorboard's event files, written by the thread that asks for it.

torch's ``SummaryWriter`` writes in a thread that ends at the first error, such as a full disk, and
the training with it at the next number.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar, text

from megatron_llmjp.runtime.patient_file import PatientFile

VERSION = "brain.Event:2"
"""Of the format, as tensorboard knows it."""
_numbers = itertools.count()


class EventFile:
    """One event file; several of a folder are shown as one."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begin at ``first_step``: earlier files' records of it and later ones do not hold."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        self._file = PatientFile(folder / f"{name}.{os.getpid()}.{next(_numbers)}")
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
