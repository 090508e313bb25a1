"""Prefetching of sample indices: each fold's indices are built before its samples are needed.

The indices of the first fold are built before process groups exist. Those of the next fold are
built by a subprocess of the first rank of each machine while the run trains. No collective waits
for an index: before each step every rank ensures, on its own, that the indices of the batch exist.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Protocol

from megatron_llmjp.data.folds.schedule import FoldPlan, Schedule
from megatron_llmjp.data.indices.deferred_check import DeferredCheck
from megatron_llmjp.data.indices.index_cache import (
    LOCK_TIMEOUT_SECONDS,
    CachedIndex,
    ensure_indices,
    find_damage,
)
from megatron_llmjp.data.indices.worker import build_in_background
from megatron_llmjp.filesystem import no_heartbeat

MAX_INLINE_COST = 1_000_000
"""Build cost up to which indices are built immediately: about 0.2 s, less than a process start."""

WaitFunction = Callable[[Callable[[], bool]], bool]
"""Waits until a function returns True; returns False if it gives up first."""


def wait_alone(ready: Callable[[], bool]) -> bool:
    """Wait in this process only, without a time limit."""
    while not ready():
        time.sleep(0.2)
    return True


class FoldIndexProvider(Protocol):
    """The part of FoldDataset that the prefetcher uses."""

    @property
    def schedule(self) -> Schedule:
        """The fold schedule."""

    def indices(self, fold: FoldPlan) -> Sequence[CachedIndex]:
        """Return the sample indices that reading this fold requires."""


class IndexPrefetcher:
    """Builds the sample indices of each fold before it starts."""

    def __init__(
        self,
        data: FoldIndexProvider,
        *,
        first_on_machine: bool,
        log: Callable[[str], None] = print,
        heartbeat: Callable[[], None] = no_heartbeat,
        check: DeferredCheck | None = None,
    ) -> None:
        """Prefetch the indices of ``data``; ``heartbeat`` is called after each index.

        ``check`` is the background check of the datasets, on the rank that does it.
        """
        self._data = data
        self._first_on_machine = first_on_machine
        self._log, self._heartbeat = log, heartbeat
        self._ready: set[str] = set()
        self._entered: set[str] = set()  # identical on all ranks, unlike _ready
        self._background: subprocess.Popen[bytes] | None = None  # builds the next fold's indices
        self._check = check

    def start(self, consumed_samples: int, batch: int, held_out: Iterable[CachedIndex]) -> None:
        """Build the indices of the next batch and of the validation sets.

        Called before process groups exist. Small folds that follow are built as well. The first
        rank of each machine also compares checksums.
        """
        folds = self._folds(consumed_samples, batch)
        more = self._following_cheap_folds(folds[-1])
        wanted = [*chain.from_iterable(map(self._data.indices, (*folds, *more))), *held_out]
        missing = [index for index in wanted if find_damage(index.folder) is not None]
        if sum(index.build_cost for index in missing) > MAX_INLINE_COST:
            names = ", ".join(fold.name for fold in folds)
            self._log(f"building {len(missing)} sample indices for {names}")
        ensure_indices(wanted, thorough=self._first_on_machine, done=self._heartbeat)
        self._ready.update(fold.name for fold in (*folds, *more))
        self._entered.update(fold.name for fold in folds)
        self._prefetch_next(folds[-1])
        if self._check is not None:
            self._check.start()

    def ensure_ready(
        self, consumed_samples: int, batch: int, wait: WaitFunction = wait_alone
    ) -> bool:
        """Return once the indices of the next batch exist; every rank calls this at each step.

        Takes microseconds, except at the start of a fold, when every rank calls ``wait``.

        Args:
            consumed_samples: samples consumed before the batch.
            batch: number of samples in the batch.
            wait: returns when the given function returns True on every rank; False to give up.

        Returns:
            False if ``wait`` gave up.

        Raises:
            DataError: the background check of the datasets found damage.
        """
        if self._check is not None:
            self._check.poll()
        for fold in self._folds(consumed_samples, batch):
            if fold.name in self._entered:
                continue
            indices = self._data.indices(fold)
            if _any_missing(indices):
                self._log(f"waiting for the sample indices of fold '{fold.name}'")
            if not wait(partial(self._ready_or_building, indices, time.monotonic())):
                return False
            self._entered.add(fold.name)
            if fold.name not in self._ready:
                ensure_indices(indices, done=self._heartbeat)
                self._ready.add(fold.name)
                self._prefetch_next(fold)
        return True

    def close(self) -> None:
        """Stop the background processes, if there are any."""
        if self._check is not None:
            self._check.close()
        self._stop_building()

    def _stop_building(self) -> None:
        if self._background is not None:
            self._background.kill()
            self._background.wait()
            self._background = None

    def _folds(self, consumed_samples: int, batch: int) -> tuple[FoldPlan, ...]:
        schedule = self._data.schedule
        edges = (consumed_samples, consumed_samples + batch - 1)
        first, last = (_fold_number(schedule.fold_of_sample(sample), schedule) for sample in edges)
        return schedule.folds[first : last + 1]

    def _following_cheap_folds(self, fold: FoldPlan) -> list[FoldPlan]:
        schedule, cheap, cost = self._data.schedule, [], 0
        for later in schedule.folds[_fold_number(fold, schedule) + 1 :]:
            indices = self._data.indices(later)
            cost += sum(
                index.build_cost for index in indices if find_damage(index.folder) is not None
            )
            if cost > MAX_INLINE_COST:
                break
            cheap.append(later)
        return cheap

    def _ready_or_building(self, indices: Sequence[CachedIndex], since: float) -> bool:
        """Return whether the indices exist; otherwise ensure that a process is building them.

        One process per machine builds all of them, as each takes seconds to start and loads torch.
        """
        if not _any_missing(indices):
            return True
        if self._first_on_machine:
            self._background = self._background or build_in_background(indices)
            failed = self._background.poll() is not None and _any_missing(indices)
        else:
            failed = time.monotonic() - since > LOCK_TIMEOUT_SECONDS
        if failed:
            ensure_indices(indices, done=self._heartbeat)  # raises the error that prevents building
        return failed

    def _prefetch_next(self, fold: FoldPlan) -> None:
        """On the first rank of a machine, start building the next fold that is not ready."""
        schedule = self._data.schedule
        later = schedule.folds[_fold_number(fold, schedule) + 1 :]
        following = next((f for f in later if f.name not in self._ready), None)
        if following is None or not self._first_on_machine:
            return
        self._stop_building()  # the process of the fold that just started, which has finished
        indices = self._data.indices(following)
        if _any_missing(indices):
            self._background = build_in_background(indices)


def _any_missing(indices: Iterable[CachedIndex]) -> bool:
    return any(find_damage(index.folder) is not None for index in indices)


def _fold_number(fold: FoldPlan, schedule: Schedule) -> int:
    return next(i for i, other in enumerate(schedule.folds) if other is fold)
