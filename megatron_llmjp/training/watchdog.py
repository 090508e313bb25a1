"""A thread on every rank that ends a hanging run and says which rank is to blame.

When one rank stops, all others wait for it in some collective, and every log says the same nothing.
Here each rank tells the others through the rendezvous store how far it is. A rank without progress
for too long writes the stacks of its threads to a file and where it stands to the store; the first
rank that answers compares all ranks and names those that are not where the others are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_llmjp.errors import EXIT_FAILURE

GRACE_SECONDS = 10.0
"""Ranks notice a hang at slightly different times: this long the others are waited for."""

_COLLECTIVES = ("torch/distributed/", "p2p_communication.py", "param_and_grad_buffer.py")


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


class Watchdog:
    """Watches the main thread of this rank; :meth:`beat` tells it of progress."""

    def __init__(
        self, store: Any, rank: int, world_size: int, minutes: float, logs: Path | None
    ) -> None:
        """Watch with a connection of its own to ``store``; ``logs`` is where stacks go."""
        self._store = store.clone() if hasattr(store, "clone") else store
        self._store.set_timeout(timedelta(seconds=GRACE_SECONDS))
        self._rank, self._world_size, self._logs = rank, world_size, logs
        self._limit = 60 * minutes
        self._main = threading.get_ident()
        self._mark = (0, "start", math.inf)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def beat(self, iteration: int, phase: str) -> None:
        """Tell that the main thread goes on, and with what."""
        self._mark = (iteration, phase, time.monotonic())

    def rest(self) -> None:
        """Look away until the next beat: what comes now, such as loading, has limits of its own."""
        self._mark = (*self._mark[:2], math.inf)

    def close(self) -> None:
        """End the watch."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(5.0, self._limit / 10)):
            if time.monotonic() - self._mark[2] > self._limit:
                self._report()
                os._exit(EXIT_FAILURE)

    def _report(self) -> None:
        """Leave the stacks in a file, and tell what can be found out about all ranks."""
        place = self._place()
        self._write_stacks()
        try:
            self._store.set(f"hang/{self._rank}", json.dumps(asdict(place)))
            time.sleep(GRACE_SECONDS)
            places = self._gather()
        except Exception:  # the store lives in the first rank, which may be the one that hangs
            places = [place]
        if places[0].rank == self._rank:
            self._tell(places)
        # The first rank holds the store: the others read it until now.
        time.sleep(GRACE_SECONDS / 4 if self._rank else GRACE_SECONDS / 2)

    def _tell(self, places: list[Place]) -> None:
        lines = [
            f"error: no progress for {self._limit / 60:g} minutes at iteration {self._mark[0]}",
            *blame(places, self._world_size),
        ]
        if self._logs is not None:
            lines.append(f"stacks of all ranks that answer: {self._logs}")
            with contextlib.suppress(OSError):
                (self._logs / "report.txt").write_text("\n".join(lines) + "\n")
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _place(self) -> Place:
        iteration, phase, _ = self._mark
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        inner = frames[-1]
        own = next((f for f in reversed(frames) if "megatron" in f.filename), inner)
        return Place(
            self._rank,
            socket.gethostname(),
            iteration,
            phase,
            f"{_short(own.filename)}:{own.lineno} in {own.name}",
            any(part in frame.filename for frame in frames[-4:] for part in _COLLECTIVES),
        )

    def _write_stacks(self) -> None:
        if self._logs is not None:
            with contextlib.suppress(OSError):
                self._logs.mkdir(parents=True, exist_ok=True)
                with (self._logs / f"stacks-rank{self._rank:05d}.txt").open("w") as stream:
                    faulthandler.dump_traceback(stream, all_threads=True)

    def _gather(self) -> list[Place]:
        keys = {rank: f"hang/{rank}" for rank in range(self._world_size)}
        answered = [rank for rank, key in keys.items() if self._store.check([key])]
        return [Place(**json.loads(self._store.get(keys[rank]))) for rank in answered]


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
        iteration, phase, line, waits = key
        members = groups[key]
        hosts = ", ".join(sorted({place.host for place in members})[:4])
        what = "waits for other ranks" if waits else "does not wait for another rank"
        lines.append(
            f"{_ranks([p.rank for p in members])} on {hosts}: iteration {iteration}, {phase}; "
            f"{what}; {line}"
        )
    if not silent and len(groups) > 1:
        lines[0] += "   <- look here first"
    return lines


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
