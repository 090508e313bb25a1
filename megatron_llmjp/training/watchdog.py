"""Hang detection: a watchdog thread on every rank that ends a run without progress.

When one rank stops, all others wait for it in a collective, and no log identifies the cause. With
the watchdog every rank gives heartbeats, and the run is considered hung if no rank gave one for too
long. Each rank then writes the stacks of its threads to a file and its state to the rendezvous
store; the first rank that responds compares the states and reports the ranks that differ.

Healthy runs are not ended by: long phases, which give a heartbeat for every batch and every part of
a file (``parallel/process_groups.py``); waiting for another rank that makes progress; a suspended
machine, since that time is not counted. After the limit the watchdog checks once more before it
acts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_llmjp.alerts.run_end import alert_end, ranks_are_supervised
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import EXIT_FAILURE
from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.parallel.process_groups import RankSync
from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.report.jobs import HANG_FOLDER, HANG_MESSAGE, HANG_REPORT, HANG_SUSPECTS
from megatron_llmjp.training.hang_report import (
    HeartbeatExchange,
    Phase,
    RankState,
    describe_ranks,
    describe_silent_first_rank,
    find_suspects,
    rank_state,
)
from megatron_llmjp.training.stop_signals import StopCoordinator

GRACE_SECONDS = 10.0
"""Time to wait for the states of other ranks, which notice a hang at slightly different times."""

CHECKS_PER_LIMIT = 10
"""Number of checks within the limit."""
MAX_PERIOD = 5.0
"""Longest time between two checks, in seconds."""

TIMEOUT_FRACTION = 0.8
"""Default limit relative to ``distributed_timeout_minutes``: a hang is reported before collectives
time out, whose error does not name the rank."""


class HangTimer:
    """Measure the time without progress; :meth:`expired` is called every ``period`` seconds."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        """Seconds."""
        self.period = min(MAX_PERIOD, limit / CHECKS_PER_LIMIT)
        self._idle, self._last = 0.0, math.inf
        self._was_exceeded = False

    def expired(self, now: float, progressed: bool) -> bool:
        """Return whether the limit was exceeded at this check and the previous one.

        Args:
            now: current time of any clock, in seconds.
            progressed: whether there was progress since the last check.
        """
        # At most two periods are counted per check: after a stopped process or a suspended machine
        # continues, the clock may be far beyond the limit.
        self._idle += max(0.0, min(now - self._last, 2 * self.period))
        self._last = now
        if progressed:
            self._idle, self._was_exceeded = 0.0, False
        if self._idle <= self.limit:
            return False
        self._was_exceeded, confirmed = True, self._was_exceeded
        return confirmed


class Watchdog:
    """Thread that detects hangs of the main threads of all ranks."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        minutes: float,
        logs: Path | None,
        on_gpu: bool = False,
        alert: Callable[[str], object] | None = None,
    ) -> None:
        """Create a watchdog with its own connections to ``store``.

        Args:
            store: key-value store shared by all ranks.
            rank: rank of this process.
            world_size: number of ranks.
            minutes: time without progress of any rank after which the run ends; 0 to disable.
            logs: folder for the stacks; None to write none.
            on_gpu: whether the ranks train on GPUs.
            alert: receives the report of a hang, on one rank.
        """
        self._store = _own_connection(store)
        self._alert = alert
        self._rank, self._world_size, self._logs = rank, world_size, logs
        self._timer = HangTimer(60 * minutes)
        self._main = threading.get_ident()
        self._phase = Phase(0, "start", 0)
        self._on_gpu = on_gpu
        self._hosts: Sequence[str] = ()
        self._heartbeats = HeartbeatExchange(_own_connection(store), self._timer.period, on_gpu)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread, unless the limit is 0."""
        if self._timer.limit > 0:
            self._heartbeats.start()
            self._thread.start()

    def begin(self, iteration: int, phase: str, counts_work: bool = False) -> None:
        """Record the phase that the main thread begins; this counts as progress.

        Args:
            iteration: current iteration.
            phase: description of the phase.
            counts_work: whether CPU time counts as progress while the main thread does not wait for
                another rank; for long library calls that give no heartbeat. Endless loops are not
                detected in such a phase.
        """
        self._phase = Phase(iteration, phase, self._phase.number + 1)
        self._heartbeats.counts_work = counts_work
        self._heartbeats.beat()

    def know_hosts(self, hosts: Sequence[str]) -> None:
        """Set the host of each rank, to name those of ranks that do not respond."""
        self._hosts = tuple(hosts)

    def beat(self) -> None:
        """Give a heartbeat: a part of the phase is done. Cheap, and callable from any thread."""
        self._heartbeats.beat()

    def close(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._heartbeats.close()

    def _run(self) -> None:
        while not self._stopped.wait(self._timer.period):
            if self._timer.expired(time.monotonic(), self._heartbeats.take_progress()):
                self._report()
                os._exit(EXIT_FAILURE)

    def _report(self) -> None:
        """Write the stacks to a file, and report the states of all ranks."""
        state = rank_state(self._main, self._rank, self._phase, self._on_gpu)
        self._write_stacks()
        states = self._gather_states(state)
        if states is None:
            self._print_report(describe_silent_first_rank(state, self._hosts))
            self._write_suspects([])
        elif states[0].rank == self._rank:
            self._print_report(describe_ranks(states, self._world_size, self._hosts))
            self._write_suspects(states)
        # The first rank serves the store, which the others may still be reading.
        time.sleep(GRACE_SECONDS / 4 if self._rank else GRACE_SECONDS / 2)

    def _print_report(self, ranks: list[str]) -> None:
        minutes = f"{self._timer.limit / 60:g} minutes"
        lines = [f"error: {HANG_MESSAGE}{minutes} at iteration {self._phase.iteration}", *ranks]
        if self._logs is not None:
            lines.append(f"stacks of all responding ranks: {self._logs}")
        text = "\n".join(lines)
        print(text, file=sys.stderr, flush=True)
        self._log(lambda logs: (logs / Path(HANG_REPORT).name).write_text(f"{text}\n"))
        if self._alert is not None:
            self._alert("; ".join(lines[:2]).removeprefix("error: "))

    def _write_suspects(self, states: list[RankState]) -> None:
        """Write the ranks to check first, for the job script that may exclude their nodes."""
        suspects = find_suspects(states, self._world_size, self._hosts)
        found = {
            "iteration": self._phase.iteration,
            "suspects": [suspect._asdict() for suspect in suspects],
        }
        self._log(lambda logs: write_atomically(logs / Path(HANG_SUSPECTS).name, json.dumps(found)))

    def _write_stacks(self) -> None:
        def dump(logs: Path) -> None:
            logs.mkdir(parents=True, exist_ok=True)
            with (logs / f"stacks-rank{self._rank:05d}.txt").open("w") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)

        self._log(dump)
        if self._on_gpu:
            self._log(lambda logs: write_collectives(logs, self._rank))

    def _log(self, write: Callable[[Path], object]) -> None:
        """Write a file with a timeout: the file system may be the cause of the hang."""
        logs = self._logs
        if logs is not None:
            _run_with_timeout(lambda: write(logs), GRACE_SECONDS)

    def _gather_states(self, own: RankState) -> list[RankState] | None:
        """Return the states of responding ranks, by rank; None if the store does not respond."""
        states: list[RankState] = []
        # A rank sees progress up to one period late, and checks again one period later.
        timeout = GRACE_SECONDS + 2 * self._timer.period

        def exchange() -> None:
            self._store.set(f"hang/{self._rank}", json.dumps(asdict(own)))
            end = time.monotonic() + timeout
            while len(self._read_states()) < self._world_size and time.monotonic() < end:
                time.sleep(GRACE_SECONDS / 10)
            states.extend(self._read_states())

        # The store does not respond if the process that serves it is stopped.
        _run_with_timeout(exchange, timeout + GRACE_SECONDS)
        return states or None

    def _read_states(self) -> list[RankState]:
        keys = {rank: f"hang/{rank}" for rank in range(self._world_size)}
        responding = [rank for rank, key in keys.items() if self._store.check([key])]
        return [RankState(**json.loads(self._store.get(keys[rank]))) for rank in responding]


def write_collectives(logs: Path, rank: int) -> None:
    """Write the collectives that NCCL has not completed, from PyTorch's flight recorder.

    ``TORCH_FR_BUFFER_SIZE=0`` disables the recorder.
    """
    import torch

    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is not None:  # torch has NCCL
        collectives = dump(includeCollectives=True, onlyActive=True)
        (logs / f"collectives-rank{rank:05d}.json").write_bytes(collectives)


def _run_with_timeout(action: Callable[[], object], seconds: float) -> None:
    """Run an action for at most ``seconds``, ignoring its exceptions."""

    def run() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=run, name="hang report", daemon=True)
    thread.start()
    thread.join(seconds)


def _own_connection(store: Any) -> Any:
    """Return a separate connection to the store for one thread."""
    own = store.clone() if hasattr(store, "clone") else store
    own.set_timeout(timedelta(seconds=GRACE_SECONDS))
    return own


class RunControl(NamedTuple):
    """Stop requests and hang detection of a run."""

    stop: StopCoordinator
    watchdog: Watchdog
    sync: RankSync
    """Heartbeats for the watchdog, and the group in which ranks wait for each other."""


@contextmanager
def hang_detection(
    config: Config, ranks: Ranks, store: Any, on_gpu: bool = False
) -> Iterator[Watchdog]:
    """Run a watchdog that ends the process if the run hangs.

    Args:
        config: the run's configuration.
        ranks: rank and world size of this process.
        store: key-value store shared by all ranks.
        on_gpu: whether the ranks train on GPUs.
    """
    minutes = config.faults.hang_timeout_minutes
    if minutes is None:
        minutes = TIMEOUT_FRACTION * config.parallel.distributed_timeout_minutes
    save = config.checkpoint.save
    logs = Path(save) / HANG_FOLDER if save is not None and not config.training.eval_only else None
    alert = None
    if not ranks_are_supervised(ranks.launcher):
        alert = partial(alert_end, config, EXIT_FAILURE, has_hung=lambda: True)
    watchdog = Watchdog(store, ranks.rank, ranks.world_size, minutes, logs, on_gpu, alert)
    watchdog.start()
    yield watchdog
    # Not after an error: closing would wait for other ranks, which may have exited.
    watchdog.close()
