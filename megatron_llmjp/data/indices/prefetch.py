"""Indices of a fold are there before its samples are needed, and no sooner than useful.

The fold that a run begins with is made before process groups exist. The next one is made by a
process beside the first rank of each machine while the run trains. No collective waits for an
index: every rank sees to it, by itself, that the indices of a batch are there before its step.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Protocol

from megatron_llmjp.data.folds.schedule import FoldPlan, Schedule
from megatron_llmjp.data.indices.index_cache import (
    PATIENCE_SECONDS,
    CachedIndex,
    ensure_indices,
    find_damage,
)
from megatron_llmjp.data.indices.worker import build_in_background
from megatron_llmjp.filesystem import no_heartbeat

CHEAP = 1_000_000
"""Work that is done at once, at most some 0.2 s: a process takes longer to start."""

Wait = Callable[[Callable[[], bool]], bool]
"""Waits until a function returns True; returns False when it gives up before."""


def wait_alone(ready: Callable[[], bool]) -> bool:
    """Wait for this process only, for as long as it takes."""
    while not ready():
        time.sleep(0.2)
    return True


class FoldIndexProvider(Protocol):
    """What FoldDataset tells."""

    @property
    def schedule(self) -> Schedule:
        """The run's data."""

    def indices(self, fold: FoldPlan) -> Sequence[CachedIndex]:
        """Everything that samples of this fold are looked up in."""


class IndexPrefetcher:
    """Makes the indices of folds in time."""

    def __init__(
        self,
        data: FoldIndexProvider,
        *,
        first_on_machine: bool,
        say: Callable[[str], None] = print,
        beat: Callable[[], None] = no_heartbeat,
    ) -> None:
        """Make those of ``data``; ``beat`` is called after each that is there."""
        self._data = data
        self._first_on_machine = first_on_machine
        self._say, self._beat = say, beat
        self._ready: set[str] = set()
        self._entered: set[str] = set()  # the same on all ranks, as what is ready is not
        self._background: subprocess.Popen[bytes] | None = None  # makes the next fold's

    def start(self, consumed_samples: int, batch: int, held_out: Iterable[CachedIndex]) -> None:
        """Make what the next batch and the validation sets need; no process group exists yet.

        Small folds that follow are made as well. The first rank of a machine compares checksums.
        """
        folds = self._folds(consumed_samples, batch)
        more = self._cheap_after(folds[-1])
        wanted = [*chain.from_iterable(map(self._data.indices, (*folds, *more))), *held_out]
        missing = [index for index in wanted if find_damage(index.folder) is not None]
        if sum(index.work for index in missing) > CHEAP:
            names = ", ".join(fold.name for fold in folds)
            self._say(f"building {len(missing)} sample indices for {names}")
        ensure_indices(wanted, thorough=self._first_on_machine, done=self._beat)
        self._ready.update(fold.name for fold in (*folds, *more))
        self._entered.update(fold.name for fold in folds)
        self._prepare_next(folds[-1])

    def before(self, consumed_samples: int, batch: int, wait: Wait = wait_alone) -> bool:
        """Return when the indices of the next batch are there; every rank calls it at each step.

        Costs microseconds, but for the first time in a fold: then every rank calls ``wait``.

        Args:
            consumed_samples: before the batch.
            batch: its samples.
            wait: returns when a function of each rank returns True, or False to give up.

        Returns:
            False when the wait was given up.
        """
        for fold in self._folds(consumed_samples, batch):
            if fold.name in self._entered:
                continue
            indices = self._data.indices(fold)
            if _are_missing(indices):
                self._say(f"waiting for the sample indices of fold '{fold.name}'")
            if not wait(partial(self._are_there, indices, time.monotonic())):
                return False
            self._entered.add(fold.name)
            if fold.name not in self._ready:
                ensure_indices(indices, done=self._beat)
                self._ready.add(fold.name)
                self._prepare_next(fold)
        return True

    def close(self) -> None:
        """End the process that makes indices, if there is one."""
        if self._background is not None:
            self._background.kill()
            self._background.wait()
            self._background = None

    def _folds(self, consumed_samples: int, batch: int) -> tuple[FoldPlan, ...]:
        schedule = self._data.schedule
        edges = (consumed_samples, consumed_samples + batch - 1)
        first, last = (_number(schedule.fold_of_sample(sample), schedule) for sample in edges)
        return schedule.folds[first : last + 1]

    def _cheap_after(self, fold: FoldPlan) -> list[FoldPlan]:
        schedule, cheap, work = self._data.schedule, [], 0
        for later in schedule.folds[_number(fold, schedule) + 1 :]:
            indices = self._data.indices(later)
            work += sum(index.work for index in indices if find_damage(index.folder) is not None)
            if work > CHEAP:
                break
            cheap.append(later)
        return cheap

    def _are_there(self, indices: Sequence[CachedIndex], asked: float) -> bool:
        """Whether these are there; sees to it that a process makes them.

        One process of a machine makes them all, as each takes seconds to start and loads torch.
        """
        if not _are_missing(indices):
            return True
        if self._first_on_machine:
            self._background = self._background or build_in_background(indices)
            failed = self._background.poll() is not None and _are_missing(indices)
        else:
            failed = time.monotonic() - asked > PATIENCE_SECONDS
        if failed:
            ensure_indices(indices, done=self._beat)  # raises what is wrong
        return failed

    def _prepare_next(self, fold: FoldPlan) -> None:
        """Have the first rank of a machine make the next fold that is not there."""
        schedule = self._data.schedule
        later = schedule.folds[_number(fold, schedule) + 1 :]
        following = next((f for f in later if f.name not in self._ready), None)
        if following is None or not self._first_on_machine:
            return
        self.close()  # of the fold that has just begun: it is done
        indices = self._data.indices(following)
        if _are_missing(indices):
            self._background = build_in_background(indices)


def _are_missing(indices: Iterable[CachedIndex]) -> bool:
    return any(find_damage(index.folder) is not None for index in indices)


def _number(fold: FoldPlan, schedule: Schedule) -> int:
    return next(i for i, other in enumerate(schedule.folds) if other is fold)
