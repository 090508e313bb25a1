"""Progress of all ranks of a run, and the report on the states of its ranks after a hang.

A rank that waits in a collective makes no progress itself, but is healthy as long as the rank it
waits for does. Progress is therefore counted for the whole run, in the rendezvous store.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from megatron_llmjp.formatting import format_names, format_ranks
from megatron_llmjp.parallel.ranks import node_name
from megatron_llmjp.training.wait_sites import (
    Frame,
    Wait,
    find_wait,
    is_known_wait,
    stack_frames,
)

_SILENT = "no response (process stopped or exited, or machine down)"

_ALL_WAIT = (
    "all ranks wait: a GPU or a link hangs, or ranks disagree on the next collective; compare the "
    "stacks and, on GPUs, collectives-rank*.json"
)
_WAITS: dict[Wait, str] = {
    "other ranks": "waits for other ranks",
    "its GPU": "waits for its GPU, which may wait for other ranks",
    "": "does not wait for another rank",
}

PROGRESS_KEY = "progress"
"""Key in the store of the counter that all ranks increment."""
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
"""Units per second of the CPU times in ``/proc``."""
MIN_CPU_FRACTION = 0.02
"""Least CPU utilization that counts as work; a thread that waits and polls uses less."""


@dataclass(frozen=True)
class RankState:
    """State of a rank at the time of a hang."""

    rank: int
    host: str
    iteration: int
    phase: str
    """Phase of the run, such as a step, a validation or a save."""
    phases: int
    """Number of phases begun so far, which all ranks begin in the same order."""
    line: str
    """Innermost line of Python code of the main thread."""
    waits_for: Wait
    """What the main thread waits for."""


class Suspect(NamedTuple):
    """A rank that may have caused a hang."""

    rank: int
    host: str
    """Empty if unknown."""
    why: str


class Phase(NamedTuple):
    """Phase of a run that a rank is in."""

    iteration: int
    name: str
    number: int
    """Number of phases begun so far."""


def rank_state(thread: int, rank: int, phase: Phase, on_gpu: bool) -> RankState:
    """Return the state of a thread of this process."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    inner = frames[-1]
    own = next((f for f in reversed(frames) if "megatron" in f.filename), inner)
    return RankState(
        rank=rank,
        host=node_name(),
        iteration=phase.iteration,
        phase=phase.name,
        phases=phase.number,
        line=f"{_short_path(own.filename)}:{own.lineno} in {own.name}",
        waits_for=find_wait([Frame(f.filename, f.name) for f in frames], on_gpu),
    )


def describe_ranks(
    states: list[RankState], world_size: int, hosts: Sequence[str] = ()
) -> list[str]:
    """Return one line per group of ranks with the same state, the most suspicious first.

    Args:
        states: states of the ranks that responded.
        world_size: number of ranks.
        hosts: host of each rank; empty if unknown.
    """
    silent = _silent_ranks(states, world_size)
    lines = []
    if silent:
        lines.append(f"{format_ranks(silent)}{_on_hosts(silent, hosts)}: {_SILENT}")
    groups = _group(states)
    lines += [_describe_group(members) for members in groups]
    if not silent and _stands_out(groups):
        lines[0] += "   <- check first"
    elif not silent and all(state.waits_for for state in states):
        lines.append(_ALL_WAIT)
    return lines


def describe_silent_first_rank(own: RankState, hosts: Sequence[str] = ()) -> list[str]:
    """Return the report if the store does not respond, which the first rank serves."""
    return [
        f"rank 0{_on_hosts([0], hosts)}: {_SILENT}; it serves the store, without which the states "
        "of the other ranks are unknown   <- check first",
        _describe_group([own]),
    ]


def find_suspects(
    states: list[RankState], world_size: int, hosts: Sequence[str] = ()
) -> list[Suspect]:
    """Return the ranks that did not respond, else those that stand out; none if all wait.

    Args:
        states: states of the ranks that responded; none if the store did not.
        world_size: number of ranks.
        hosts: host of each rank; empty if unknown.
    """
    silent = _silent_ranks(states, world_size) if states else [0]
    if silent:
        return [Suspect(rank, hosts[rank] if hosts else "", "no response") for rank in silent]
    groups = _group(states)
    if not _stands_out(groups):
        return []
    return [
        Suspect(state.rank, state.host, f"{_WAITS[state.waits_for]}; {state.line}")
        for state in groups[0]
    ]


def _silent_ranks(states: list[RankState], world_size: int) -> list[int]:
    responding = {state.rank for state in states}
    return [rank for rank in range(world_size) if rank not in responding]


def _on_hosts(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    names = list(dict.fromkeys(hosts[rank] for rank in ranks)) if hosts else []
    return f" on {format_names(names, 4)}" if names else ""


def _group(states: list[RankState]) -> list[list[RankState]]:
    """Return groups of ranks with the same state, the most suspicious first."""
    groups: dict[tuple[int, bool, str, str], list[RankState]] = defaultdict(list)
    for state in states:
        # A rank that waits is a victim, as long as another one is behind it or does not wait.
        waits = bool(state.waits_for)
        groups[state.phases, waits, state.waits_for, state.line].append(state)
    return [groups[key] for key in sorted(groups)]


def _stands_out(groups: list[list[RankState]]) -> bool:
    """Whether the first group is behind the last one, or does not wait as it does."""
    first, last = ((group[0].phases, bool(group[0].waits_for)) for group in (groups[0], groups[-1]))
    return first < last


def _describe_group(members: list[RankState]) -> str:
    """Return a line for ranks with the same state."""
    state = members[0]
    hosts = ", ".join(sorted({member.host for member in members})[:4])
    ranks = format_ranks(member.rank for member in members)
    return (
        f"{ranks} on {hosts}: iteration {state.iteration}, {state.phase}; "
        f"{_WAITS[state.waits_for]}; {state.line}"
    )


def _short_path(filename: str) -> str:
    """Return a file's path relative to the folder of its package."""
    parts = Path(filename).parts
    at = max((i for i, part in enumerate(parts) if part.startswith("megatron")), default=0)
    return "/".join(parts[at:] if at else parts[-2:])


class HeartbeatExchange:
    """Exchange heartbeats among all ranks through the store, in a thread."""

    def __init__(self, store: Any, period: float, on_gpu: bool) -> None:
        """Exchange heartbeats every ``period`` seconds through ``store``."""
        self.counts_work = False
        """Whether CPU time of the main thread and of child processes counts as a heartbeat; for
        phases with long library calls."""
        self._store, self._period, self._on_gpu = store, period, on_gpu
        self._own = self._progressed = False
        self._seen = -1
        self._main = threading.get_ident()
        self._activity = _ThreadActivity(period)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="progress", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def beat(self) -> None:
        """Give a heartbeat. Cheap, and callable from any thread."""
        self._own = self._progressed = True

    def take_progress(self) -> bool:
        """Return whether any rank made progress since the last call."""
        progressed, self._progressed = self._progressed, False
        return progressed

    def close(self) -> None:
        """Stop the thread, unless it waits for a store that does not respond."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._period)

    def _exchange(self) -> None:
        # The store does not respond if its process is stopped: only this thread may wait for it.
        while not self._stopped.wait(self._period):
            if self._activity.advanced(self.counts_work and not self._waits()):
                self.beat()
            own, self._own = self._own, False
            try:
                count = self._store.add(PROGRESS_KEY, int(own))
            except Exception:  # the first rank has exited, which is reported elsewhere
                return
            if count != self._seen:
                self._seen, self._progressed = count, True

    def _waits(self) -> bool:
        """Whether the main thread waits for other ranks or its GPU, which may use CPU time too."""
        return is_known_wait(stack_frames(sys._current_frames().get(self._main)), self._on_gpu)


class _ThreadActivity:
    """I/O and CPU time of the main thread, as counted by the kernel."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._task = Path(f"/proc/self/task/{threading.get_native_id()}")
        self._process = psutil.Process()
        self._bytes, self._seconds = self._transferred(), 0.0

    def advanced(self, counts_work: bool) -> bool:
        """Return whether there was I/O, or with ``counts_work`` CPU time, since the last call."""
        transferred, before = self._transferred(), self._bytes
        self._bytes = transferred
        if not counts_work:
            return transferred != before
        seconds, before_seconds = self._cpu_seconds(), self._seconds
        self._seconds = seconds
        return transferred != before or seconds - before_seconds > MIN_CPU_FRACTION * self._period

    def _transferred(self) -> int:
        """Return the bytes that the thread read and wrote; 0 if the kernel does not report them."""
        try:
            lines = (self._task / "io").read_text().splitlines()
        except OSError:
            return 0
        counts = dict(line.split(": ") for line in lines)
        return int(counts["rchar"]) + int(counts["wchar"])

    def _cpu_seconds(self) -> float:
        """Return the CPU seconds of the thread and of all child processes."""
        seconds = 0.0
        with contextlib.suppress(OSError, psutil.Error):
            fields = (self._task / "stat").read_text().rpartition(")")[2].split()
            seconds += (float(fields[11]) + float(fields[12])) / _CLOCK_TICKS
            for child in self._process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    times = child.cpu_times()
                    seconds += times.user + times.system
        return seconds
