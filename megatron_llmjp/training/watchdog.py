"""Hang detection: heartbeats of a rank, and a thread that ends a run without progress.

A thread on every rank that ends a hanging run and says which rank is to blame.

When one rank stops, all others wait for it in some collective, and no log identifies the cause.
Here every rank gives heartbeats, and the run hangs when no rank gave one for too long. Then each
rank writes the stacks of its threads to a file and where it stands to the rendezvous store; the
first rank that answers compares all ranks and names those that are not where the others are.

What must not end a healthy run: long phases, in which heartbeats come from every batch and every
piece of a file (``parallel/process_groups.py``); a rank that waits for another one which
makes progress; a machine that was suspended, whose time away is not counted. And after
the limit the watchdog looks again before it acts.

What watches a run: whether it is asked to stop, and whether it hangs.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import EXIT_FAILURE
from megatron_llmjp.parallel.process_groups import RankSync
from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.training.hang_report import Place, Progress, blame, blame_first_rank, place_of
from megatron_llmjp.training.stop_signals import Guard

GRACE_SECONDS = 10.0
"""Ranks notice a hang at slightly different times: this long the others are waited for."""

PERIODS = 10
"""How often the watchdog looks within its limit."""
LONGEST_PERIOD = 5.0
"""Seconds."""


class Patience:
    """Whether a run was quiet for too long, asked every ``period`` seconds."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        """Seconds."""
        self.period = min(LONGEST_PERIOD, limit / PERIODS)
        self._quiet, self._last = 0.0, math.inf
        self._suspects = False

    def is_over(self, now: float, news: bool) -> bool:
        """Whether to act.

        Args:
            now: seconds of any clock.
            news: whether there was progress since this was asked last.
        """
        # No more than two periods are counted: a process that was stopped, or a machine that was
        # suspended, comes back to find the limit long exceeded.
        self._quiet += max(0.0, min(now - self._last, 2 * self.period))
        self._last = now
        if news:
            self._quiet, self._suspects = 0.0, False
        if self._quiet <= self.limit:
            return False
        # Look again before acting.
        self._suspects, suspected = True, self._suspects
        return suspected


class Watchdog:
    """Watches the main thread of this rank."""

    def __init__(
        self, store: Any, rank: int, world_size: int, minutes: float, logs: Path | None
    ) -> None:
        """Watch with connections of its own to ``store``.

        Args:
            store: shared by all ranks.
            rank: of this process.
            world_size: number of ranks.
            minutes: without progress of any rank that end the run; 0 for never.
            logs: where stacks go.
        """
        self._store = _connection(store)
        self._rank, self._world_size, self._logs = rank, world_size, logs
        self._patience = Patience(60 * minutes)
        self._main = threading.get_ident()
        self._mark = (0, "start")
        self._progress = Progress(_connection(store), self._patience.period)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch, unless the limit is 0."""
        if self._patience.limit > 0:
            self._progress.start()
            self._thread.start()

    def begin(self, iteration: int, phase: str, counts_work: bool = False) -> None:
        """Note what the main thread does next, which is progress.

        Args:
            iteration: where the run is.
            phase: what is begun, in words.
            counts_work: whether processor time spent in it counts as progress, as long as the main
                thread waits for no other rank: for calls into libraries that take long and give no
                heartbeat. A loop without an end is not found in such a phase.
        """
        self._mark = (iteration, phase)
        self._progress.counts_work = counts_work
        self._progress.beat()

    def beat(self) -> None:
        """A heartbeat: some piece of the phase is done. Called from any thread; costs nothing."""
        self._progress.beat()

    def close(self) -> None:
        """End the watch."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._progress.close()

    def _watch(self) -> None:
        while not self._stopped.wait(self._patience.period):
            if self._patience.is_over(time.monotonic(), self._progress.take_news()):
                self._report()
                os._exit(EXIT_FAILURE)

    def _report(self) -> None:
        """Leave the stacks in a file, and tell what can be found out about all ranks."""
        place = place_of(self._main, self._rank, *self._mark)
        self._write_stacks()
        places = self._ask_all(place)
        if places is None:
            self._tell(blame_first_rank(place))
        elif places[0].rank == self._rank:
            self._tell(blame(places, self._world_size))
        # The first rank holds the store: the others read it until now.
        time.sleep(GRACE_SECONDS / 4 if self._rank else GRACE_SECONDS / 2)

    def _tell(self, ranks: list[str]) -> None:
        minutes = f"{self._patience.limit / 60:g} minutes"
        lines = [f"error: no progress for {minutes} at iteration {self._mark[0]}", *ranks]
        if self._logs is not None:
            lines.append(f"stacks of all ranks that answer: {self._logs}")
        text = "\n".join(lines)
        print(text, file=sys.stderr, flush=True)
        self._log(lambda logs: (logs / "report.txt").write_text(f"{text}\n"))

    def _write_stacks(self) -> None:
        def dump(logs: Path) -> None:
            logs.mkdir(parents=True, exist_ok=True)
            with (logs / f"stacks-rank{self._rank:05d}.txt").open("w") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)

        self._log(dump)

    def _log(self, write: Callable[[Path], object]) -> None:
        """Write a file, without waiting for ever for a file system that may be what hangs."""
        logs = self._logs
        if logs is not None:
            _bounded(lambda: write(logs), GRACE_SECONDS)

    def _ask_all(self, own: Place) -> list[Place] | None:
        """Places of the ranks that answer, by rank; None when the store does not."""
        places: list[Place] = []
        # Each rank learns of progress a period late at most, and looks again a period later.
        patience = GRACE_SECONDS + 2 * self._patience.period

        def ask() -> None:
            self._store.set(f"hang/{self._rank}", json.dumps(asdict(own)))
            end = time.monotonic() + patience
            while len(self._gather()) < self._world_size and time.monotonic() < end:
                time.sleep(GRACE_SECONDS / 10)
            places.extend(self._gather())

        # A store whose process is stopped never answers.
        _bounded(ask, patience + GRACE_SECONDS)
        return places or None

    def _gather(self) -> list[Place]:
        keys = {rank: f"hang/{rank}" for rank in range(self._world_size)}
        answered = [rank for rank, key in keys.items() if self._store.check([key])]
        return [Place(**json.loads(self._store.get(keys[rank]))) for rank in answered]


def _bounded(action: Callable[[], object], seconds: float) -> None:
    """Act for so long at most; what the action raises is ignored."""

    def act() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=act, name="hang report", daemon=True)
    thread.start()
    thread.join(seconds)


def _connection(store: Any) -> Any:
    """A connection of one thread's own."""
    own = store.clone() if hasattr(store, "clone") else store
    own.set_timeout(timedelta(seconds=GRACE_SECONDS))
    return own


STACKS = "hang"
"""Folder of stacks in the save folder."""

SHARE_OF_TIMEOUT = 0.8
"""A hang is told before a collective gives up, which tells less."""


class Watch(NamedTuple):
    """What watches a run."""

    guard: Guard
    watchdog: Watchdog
    work: RankSync
    """Heartbeats for the watchdog, and the group that ranks wait in for each other."""


@contextmanager
def watched(config: Config, ranks: Ranks, store: Any) -> Iterator[Watchdog]:
    """End the run if it hangs, from now on.

    Args:
        config: the run.
        ranks: this process's place.
        store: shared by all ranks.
    """
    minutes = config.faults.hang_timeout_minutes
    if minutes is None:
        minutes = SHARE_OF_TIMEOUT * config.parallel.distributed_timeout_minutes
    save = config.checkpoint.save
    logs = Path(save) / STACKS if save is not None and not config.training.eval_only else None
    watchdog = Watchdog(store, ranks.rank, ranks.world_size, minutes, logs)
    watchdog.start()
    yield watchdog
    # Not after an error: the other ranks may be gone, and closing would wait for them.
    watchdog.close()
