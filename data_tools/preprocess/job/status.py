"""Status of an unfinished job, in a file of its work folder, for other processes.

The job replaces the file every few seconds. Whether the job is alive is not decided by this file
but by the owner record of the folder and its heartbeats (``checkpoint/run_lock.py``).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from data_tools.preprocess.job.journal import SourceCounts
from data_tools.preprocess.job.work_folder import FolderLostError
from data_tools.statistics.counts import Count
from megatron_llmjp.errors import UserError

STATUS = "status.json"
SECONDS_BETWEEN_WRITES = 5.0
RATE_SECONDS = 60.0
"""Rates are those of the last minute."""

Stage = Literal["starting", "encoding", "finishing", "stopped", "broken", "failed"]
_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Amount:
    """An amount of work.

    Attributes:
        disk: bytes of the input files, as on disk.
        text: bytes of decompressed input.
        documents: documents.
        tokens: tokens of all keys.
    """

    disk: _Rate = 0
    text: _Rate = 0
    documents: _Rate = 0
    tokens: _Rate = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __sub__(self, other: Amount) -> Amount:
        return Amount(
            **{name: max(value - getattr(other, name), 0) for name, value in vars(self).items()}
        )

    def per_second(self, seconds: float) -> Amount:
        """Return the rates of this amount in some time."""
        return Amount(**{name: value / seconds for name, value in vars(self).items()})


class RateMeter:
    """Measures the rates of a process over the last minute, in which it may run several jobs."""

    def __init__(self) -> None:
        self._done = Amount()
        self._samples = deque([(time.monotonic(), self._done)])

    def add(self, more: Amount) -> None:
        """Add work that was done now."""
        now = time.monotonic()
        self._done = self._done + more
        if now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, self._done))
            while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_SECONDS:
                self._samples.popleft()

    def rates(self) -> Amount:
        """Return the work per second."""
        since, earlier = self._samples[0]
        seconds = time.monotonic() - since
        return (self._done - earlier).per_second(seconds) if seconds > 0 else Amount()


@dataclass(frozen=True)
class JobStatus:
    """Status of a job, or of one part of an array.

    Attributes:
        stage: what the job does; ``stopped`` by Ctrl-C, ``failed`` by its input or options, for the
            reason in ``error``, ``broken`` by something that another start may not find again, such
            as a full disk.
        done: amount of work that is done, including that of earlier starts.
        rates: per second, over the last minute.
        total: bytes of its input on disk; 0 if unknown.
        array_total: bytes of the input of all parts; 0 without an array.
        files: number of input files, and of those that are finished.
        rejected: number of rejected lines.
        started: start of this process, in seconds since the epoch.
        updated: time of this status, likewise.
        point: where this process resumed.
        fruitless: number of starts before this one, in a row, that were lost without progress.
        error: why the job failed.
    """

    stage: Stage = "starting"
    done: Amount = field(default_factory=Amount)
    rates: Amount = field(default_factory=Amount)
    total: Count = 0
    array_total: Count = 0
    files: tuple[Count, Count] = (0, 0)
    rejected: Count = 0
    started: float = 0.0
    updated: float = 0.0
    point: tuple[Count, Count] = (0, 0)
    fruitless: Count = 0
    error: str = ""


def amount_of(counts: Sequence[SourceCounts]) -> Amount:
    """Return the sum of the counts of all sources; their bytes on disk are not counted."""
    return Amount(
        text=sum(source_counts.bytes for source_counts in counts),
        documents=sum(source_counts.documents for source_counts in counts),
        tokens=sum(sum(source_counts.tokens.values()) for source_counts in counts),
    )


_STATUS = TypeAdapter(JobStatus)


def read_status(folder: Path) -> JobStatus | None:
    """Return the status in a work folder; None if there is none or it is damaged."""
    try:
        return _STATUS.validate_python(json.loads((folder / STATUS).read_bytes()))
    except (OSError, ValueError, RecursionError, ValidationError):
        return None


class StatusWriter:
    """Writer of the status of this process's job. Errors of the file system are ignored."""

    def __init__(
        self,
        folder: Path,
        total: int,
        files: int,
        array_total: int,
        point: tuple[int, int],
        meter: RateMeter,
    ) -> None:
        """Write the first status.

        Args:
            folder: the work folder, which this process holds.
            total: bytes of the input on disk.
            files: number of input files.
            array_total: bytes of the input of all parts of the array; 0 without one.
            point: where this process resumes: number of the source, and position in it.
            meter: measures the rates of this process.
        """
        self.folder = folder
        before = read_status(folder)
        lost = before is not None and before.stage not in ("stopped", "failed")
        fruitless = before.fruitless + 1 if before and lost and before.point == point else 0
        self.status = JobStatus(
            total=total,
            files=(files, 0),
            array_total=array_total,
            started=time.time(),
            point=point,
            fruitless=fruitless,
        )
        self._meter = meter
        self._written = 0.0
        self._write()

    def begin(self, earlier: Amount) -> None:
        """Record the work that earlier starts have done, before the first update."""
        self.status = replace(self.status, done=earlier)
        self._last = earlier

    def update(self, done: Amount, finished_files: int, rejected: int) -> bool:
        """Record the work done; return whether the status was written now."""
        self._meter.add(done - self._last)
        self._last = done
        age = time.monotonic() - self._written
        if age < SECONDS_BETWEEN_WRITES and self.status.stage == "encoding":
            return False
        rates = self._meter.rates()
        files = (self.status.files[0], finished_files)
        self.status = replace(
            self.status, stage="encoding", done=done, rates=rates, files=files, rejected=rejected
        )
        self._write()
        return True

    def change(self, stage: Stage, error: str = "") -> None:
        """Record another stage, with the last amounts."""
        self.status = replace(self.status, stage=stage, error=error, rates=Amount())
        self._write()

    @contextlib.contextmanager
    def recorded_outcome(self) -> Iterator[None]:
        """Record how the body ends, unless another process has taken the folder over."""
        try:
            yield
        except FolderLostError:
            raise
        except KeyboardInterrupt:
            self.change("stopped")
            raise
        except UserError as error:
            self.change("failed", str(error))
            raise
        except Exception as error:
            self.change("broken", f"{type(error).__name__}: {error}")
            raise

    def _write(self) -> None:
        self._written = time.monotonic()
        self.status = replace(self.status, updated=time.time())
        text = json.dumps(asdict(self.status))
        temporary = self.folder / f".{STATUS}.tmp"  # of this process, which holds the folder
        with contextlib.suppress(OSError):  # not flushed to disk: it is of no use after a crash
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            temporary.replace(self.folder / STATUS)
