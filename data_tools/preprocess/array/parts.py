"""States of a job and of the parts of an array, read from their files by other processes."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.documents import read_dataset_manifest
from data_tools.preprocess.array.shards import part_prefix
from data_tools.preprocess.job.status import Amount, JobStatus, read_status
from megatron_llmjp.checkpoint.run_lock import (
    HEARTBEAT_TIMEOUT_SECONDS,
    Owner,
    heartbeat_age,
    is_on_this_machine,
    is_owner_alive,
    read_owner,
)
from megatron_llmjp.errors import UserError

State = Literal["complete", "running", "stalled", "waiting", "stopped", "failed", "dead"]

SECONDS_WITHOUT_PROGRESS = 60.0
"""Time without progress after which it is reported; a slow file system or document may need it."""
MAX_FRUITLESS_STARTS = 3
"""A part that was lost this often in a row, without progress, is not started again by others."""


@dataclass(frozen=True)
class PartState:
    """State of a job, or of one part of an array.

    Attributes:
        number: number of the part; 0 for a job without parts.
        state: what it does; ``waiting`` before its first start, ``dead`` if its process is gone
            without having recorded an end, ``stalled`` if its process exists without heartbeats.
        why: reason of the state, or where it runs.
        done: amount of work done.
        rates: the same per second, of the last minute.
        total: bytes of its input on disk; None if unknown.
        array_total: bytes of the input of all parts on disk; None if unknown.
        files: number of input files, and of those that are finished; None if unknown.
        rejected: number of rejected lines.
        sign_of_life: seconds since the last sign of life; None for a process that has ended.
        retry: whether another process may continue it.
    """

    number: int
    state: State
    why: str = ""
    done: Amount = field(default_factory=Amount)
    rates: Amount = field(default_factory=Amount)
    total: int | None = None
    array_total: int | None = None
    files: tuple[int, int] | None = None
    rejected: int = 0
    sign_of_life: float | None = None
    retry: bool = False


def find_keys(prefix: str) -> dict[str, dict[str, Any]]:
    """Return the manifests of the finished datasets of an output prefix, by key."""
    found: dict[str, dict[str, Any]] = {}
    folder, name = Path(prefix).parent, Path(prefix).name
    pattern = re.compile(rf"{re.escape(name)}_(.+)_document")
    for path in sorted(folder.glob("*_document.idx")) if folder.is_dir() else ():
        match = pattern.fullmatch(path.stem)
        if match is None:
            continue
        manifest = read_dataset_manifest(path.with_suffix(""))
        if manifest is not None and manifest.get("key") == match[1]:
            found[match[1]] = manifest
    return found


def read_part(prefix: str, number: int, now: float | None = None) -> PartState:
    """Return the state of the job of an output prefix, or of a part by its own prefix.

    Raises:
        UserError: its manifest is damaged.
    """
    folder = Path(f"{prefix}.partial")
    status, owner = read_status(folder), read_owner(folder)
    if owner is None and status is None and (manifests := find_keys(prefix)):
        return _complete(number, list(manifests.values()))
    if owner is None and status is None:
        is_older = (folder / "journal.jsonl").exists()  # of an earlier version
        why = "interrupted" if is_older else "not started"
        return PartState(number, "stopped" if is_older else "waiting", why, retry=True)
    state, why, retry, age = _state(folder, status, owner, time.time() if now is None else now)
    if status is None:
        return PartState(number, state, why, sign_of_life=age, retry=retry)
    return PartState(
        number,
        state,
        why,
        status.done,
        status.rates if state == "running" else Amount(),
        status.total,
        status.array_total or None,
        status.files,
        status.rejected,
        age,
        retry,
    )


def _state(
    folder: Path, status: JobStatus | None, owner: Owner | None, now: float
) -> tuple[State, str, bool, float | None]:
    """Return state, reason, whether others may continue, and the age of the last sign of life."""
    if owner is None:
        assert status is not None
        if status.stage == "failed":
            return "failed", status.error, False, None
        if status.stage == "broken":
            return "failed", status.error, status.fruitless < MAX_FRUITLESS_STARTS, None
        if status.stage == "stopped":
            return "stopped", "interrupted; the same command resumes it", True, None
        retry = status.fruitless + 1 < MAX_FRUITLESS_STARTS
        return "dead", f"its process ended without a reason{_often(status)}", retry, None
    age = heartbeat_age(folder)
    if status is not None and status.updated:
        age = min(now - status.updated, now if age is None else age)
    age = None if age is None else max(age, 0.0)
    since = "" if age is None else f"; last sign of life {age:,.0f} s ago"
    if not is_owner_alive(folder, owner):
        where = (
            "its process is gone"
            if is_on_this_machine(owner)
            else f"no heartbeat for {HEARTBEAT_TIMEOUT_SECONDS:.0f} s from another machine, by the "
            "clocks of both"
        )
        retry = status is None or status.fruitless + 1 < MAX_FRUITLESS_STARTS
        return "dead", f"{owner}: {where}{since}{_often(status)}", retry, age
    if age is not None and age > HEARTBEAT_TIMEOUT_SECONDS:
        return "stalled", f"{owner}: exists, but is suspended or hangs{since}", False, age
    stage = "starting" if status is None else status.stage
    idle = 0.0 if status is None else now - status.updated
    progress = f"; last progress {idle:,.0f} s ago" if idle > SECONDS_WITHOUT_PROGRESS else ""
    return "running", f"{owner}: {stage}{progress}", False, age


def _often(status: JobStatus | None) -> str:
    if status is None or not status.fruitless:
        return ""
    return f"; lost {status.fruitless + 1} times in a row at the same point"


def _complete(number: int, manifests: list[dict[str, Any]]) -> PartState:
    """Return the state of finished datasets, from their manifests."""
    first, disk, text, rejected = manifests[0], 0, 0, 0
    try:
        is_merged = "array" in first  # its manifest names the files without their sizes
        for source in () if is_merged else first["recipe"]["sources"]:
            start, end = source.get("bytes") or (0, source["size"] or 0)
            disk += end - start
        tallies = first["tallies"]
        for counts in tallies:
            text += counts["bytes"]
            rejected += sum(counts["rejected"].values())
        tokens = sum(manifest["tokens"] for manifest in manifests)
        done = Amount(disk, text, first["documents"], tokens)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the manifest of part {number} is damaged: {error!r}") from error
    count = len(tallies)
    return PartState(
        number,
        "complete",
        done=done,
        total=None if is_merged else disk,
        files=(count, count),
        rejected=rejected,
    )


def array_folder(prefix: str) -> Path:
    """Return the folder that the task holds that waits for the last parts and merges them."""
    return Path(f"{prefix}_parts.partial")


def count_of_parts(prefix: str) -> list[int]:
    """Return the numbers of parts of all arrays with this output prefix, ascending."""
    pattern = re.compile(rf"{re.escape(Path(prefix).name)}_part\d{{5}}of(\d{{5}})(?:_.*|\.partial)")
    folder = Path(prefix).parent
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted({int(match[1]) for name in names if (match := pattern.fullmatch(name))})


class ArrayParts:
    """Reader of the states of all parts of an array; those that are complete are read once."""

    def __init__(self, prefix: str, count: int) -> None:
        self.prefix, self.count = prefix, count
        self._complete: dict[int, PartState] = {}

    def read(self) -> list[PartState]:
        """Return the states of all parts, in order."""
        return [self.read_one(number) for number in range(self.count)]

    def read_one(self, number: int) -> PartState:
        """Return the state of one part."""
        if number not in self._complete:
            found = read_part(part_prefix(self.prefix, number, self.count), number)
            if found.state != "complete":
                return found
            self._complete[number] = found
        return self._complete[number]
