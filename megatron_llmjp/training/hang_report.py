"""Progress of all ranks, and the report on a hang: where each rank is, and which to look at first.

Where the ranks of a run stand when it hangs, and which of them to look at first.

Whether any rank of a run makes progress: one counter that all ranks add to.

A rank that waits for another one in a collective makes no progress by itself, and is healthy as
long as the other one does. So progress is counted for the whole run, in the rendezvous store.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import traceback
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

_WAITS_FOR_OTHERS = (
    "torch/distributed/",
    "p2p_communication.py",
    "param_and_grad_buffer.py",
    "megatron_llmjp/parallel/process_groups.py",
    "megatron_llmjp/training/stop_signals.py",
)
"""Files whose functions wait for other ranks."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    rank: int
    host: str
    iteration: int
    phase: str
    """What it was about to do: a step, a validation, a save."""
    line: str
    """The innermost line of Python of its main thread."""
    waits: bool
    """Whether that line is inside a collective, hence waits for another rank."""


def place_of(thread: int, rank: int, iteration: int, phase: str) -> Place:
    """Where a thread of this process stands."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    inner = frames[-1]
    own = next((f for f in reversed(frames) if "megatron" in f.filename), inner)
    return Place(
        rank,
        socket.gethostname(),
        iteration,
        phase,
        f"{_short(own.filename)}:{own.lineno} in {own.name}",
        waits_for_others([frame.filename for frame in frames]),
    )


def waits_for_others(files: list[str]) -> bool:
    """Whether a stack of these files, innermost last, is inside a collective."""
    return any(part in name for name in files[-4:] for part in _WAITS_FOR_OTHERS)


def files_of(frame: FrameType | None) -> list[str]:
    """Files of a stack, innermost last; reads no source, so it is cheap."""
    names = []
    while frame is not None:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back
    return names[::-1]


def blame(places: list[Place], world_size: int) -> list[str]:
    """Which ranks to look at, from the places of those that answer; a line for each group."""
    answered = {place.rank for place in places}
    silent = [rank for rank in range(world_size) if rank not in answered]
    lines = []
    if silent:
        lines.append(f"{_ranks(silent)}: no answer (stopped, gone, or its machine is)")
    groups: dict[tuple[int, str, str, bool], list[Place]] = defaultdict(list)
    for place in places:
        groups[place.iteration, place.phase, place.line, place.waits].append(place)
    # Those behind come first, then those that are busy with something of their own.
    for key in sorted(groups, key=lambda k: (k[0], k[3])):
        lines.append(_describe(groups[key]))
    if not silent and len(groups) > 1:
        lines[0] += "   <- look here first"
    return lines


def blame_first_rank(own: Place) -> list[str]:
    """The same where the store does not answer: the first rank holds it."""
    return [
        "rank 0: no answer (stopped, gone, or its machine is); the other ranks cannot be asked "
        "without it   <- look here first",
        _describe([own]),
    ]


def _describe(members: list[Place]) -> str:
    """A line for ranks that stand at the same place."""
    one = members[0]
    hosts = ", ".join(sorted({place.host for place in members})[:4])
    what = "waits for other ranks" if one.waits else "does not wait for another rank"
    return (
        f"{_ranks([p.rank for p in members])} on {hosts}: iteration {one.iteration}, {one.phase}; "
        f"{what}; {one.line}"
    )


def _ranks(ranks: list[int]) -> str:
    """``ranks 0-3, 8``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _short(filename: str) -> str:
    """A file's path from its package on."""
    parts = Path(filename).parts
    at = max((i for i, part in enumerate(parts) if part.startswith("megatron")), default=0)
    return "/".join(parts[at:] if at else parts[-2:])


COUNTER = "progress"

LEAST_SHARE = 0.02
"""Of a processor that work takes; a thread that waits and looks now and then takes less."""


class Progress:
    """Heartbeats of this rank, and news of those of the others."""

    def __init__(self, store: Any, period: float) -> None:
        """Exchange news every ``period`` seconds through ``store``, from a thread."""
        self.counts_work = False
        """Whether work of the main thread counts, although it gives no heartbeat: its processor
        time, and that of processes it started. For phases with long calls into libraries."""
        self._store, self._period = store, period
        self._own = self._news = False
        self._seen = -1
        self._main = threading.get_ident()
        self._activity = _Activity(period)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="progress", daemon=True)

    def start(self) -> None:
        """Begin to exchange news."""
        self._thread.start()

    def beat(self) -> None:
        """This rank makes progress. Called from any thread; costs nothing."""
        self._own = self._news = True

    def take_news(self) -> bool:
        """Whether any rank made progress since this was asked last."""
        news, self._news = self._news, False
        return news

    def close(self) -> None:
        """End the thread, unless it waits for a store that does not answer."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._period)

    def _exchange(self) -> None:
        # A store whose process is stopped never answers: nothing but this thread waits for it.
        while not self._stopped.wait(self._period):
            if self._activity.advanced(self.counts_work and not self._waits()):
                self.beat()
            own, self._own = self._own, False
            try:
                count = self._store.add(COUNTER, int(own))
            except Exception:  # the first rank is gone, which is reported elsewhere
                return
            if count != self._seen:
                self._seen, self._news = count, True

    def _waits(self) -> bool:
        """Whether the main thread waits for other ranks, which takes processor time, too."""
        return waits_for_others(files_of(sys._current_frames().get(self._main)))


class _Activity:
    """What the kernel counted for the main thread: bytes read and written, processor time."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._task = Path(f"/proc/self/task/{threading.get_native_id()}")
        self._process = psutil.Process()
        self._bytes, self._seconds = self._transferred(), 0.0

    def advanced(self, counts_work: bool) -> bool:
        """Whether there is more than when this was asked last."""
        transferred, before = self._transferred(), self._bytes
        self._bytes = transferred
        if not counts_work:
            return transferred != before
        seconds, worked = self._worked(), self._seconds
        self._seconds = seconds
        return transferred != before or seconds - worked > LEAST_SHARE * self._period

    def _transferred(self) -> int:
        """Bytes that the thread read and wrote so far; 0 where the kernel does not report them."""
        try:
            lines = (self._task / "io").read_text().splitlines()
        except OSError:
            return 0
        counts = dict(line.split(": ") for line in lines)
        return int(counts["rchar"]) + int(counts["wchar"])

    def _worked(self) -> float:
        """Processor seconds of the thread and of the processes that this one started."""
        seconds = 0.0
        with contextlib.suppress(OSError, psutil.Error):
            fields = (self._task / "stat").read_text().rpartition(")")[2].split()
            seconds += float(fields[11]) + float(fields[12])
            for child in self._process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    times = child.cpu_times()
                    seconds += times.user + times.system
        return seconds
