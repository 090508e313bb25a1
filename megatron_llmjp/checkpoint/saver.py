"""A run's checkpoints over time: written at once or beside training, reported, and thinned out.

A checkpoint that cannot be written does not end the run: its cause is told, training goes on, and
the next save starts afresh. Only the last one must succeed (:meth:`Saver.close`).
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import publish
from megatron_llmjp.checkpoint.removal import REMOVAL_WAIT_SECONDS, CheckpointRemover
from megatron_llmjp.checkpoint.retention import TrainingPosition, reason_to_save
from megatron_llmjp.checkpoint.save import (
    RunDescription,
    SaveProgress,
    plan_save,
    write_synchronously,
)
from megatron_llmjp.checkpoint.sharded_state import RunState
from megatron_llmjp.checkpoint.writer import HostBuffers, NotFiniteError, ThreadAsyncCaller
from megatron_llmjp.config.schema import CheckpointConfig
from megatron_llmjp.errors import RunError
from megatron_llmjp.parallel.process_groups import DEFAULT_RANK_SYNC, RankSync


class SaveError(RunError):
    """The run's last checkpoint could not be saved."""


@dataclass(frozen=True)
class FoldEnds:
    """Where folds end in a run."""

    samples: tuple[int, ...] = ()
    """Samples trained on."""
    iterations: frozenset[int] = frozenset()


@dataclass
class _Pending:
    """A save under way."""

    iteration: int
    samples: int
    began: float
    stall: float = 0.0
    """Seconds that training waited for it."""


class _Queue(AsyncCallsQueue):
    """megatron-core's queue of asynchronous saves, with threads in place of forked processes."""

    def __init__(self, work: RankSync) -> None:
        super().__init__()
        self._work = work

    def _get_async_caller(self) -> ThreadAsyncCaller:
        return ThreadAsyncCaller(self._work)


class Saver:
    """Saves a run's checkpoints; all ranks call its methods at the same iterations."""

    def __init__(
        self,
        about: RunDescription,
        fold_ends: FoldEnds,
        may_publish: Callable[[], None],
        iteration: int,
        work: RankSync = DEFAULT_RANK_SYNC,
    ) -> None:
        """Prepare to save.

        Args:
            about: configuration and tokenizer files of the run.
            fold_ends: where its folds end.
            may_publish: raises when another run has taken the save folder.
            iteration: where the run begins.
            work: takes heartbeats; ranks wait in it for the one whose disk is slowest.
        """
        self.saved = iteration
        """Iteration of the newest save begun, or where the run began."""
        self.published_samples: int | None = None
        """Samples trained on in the newest checkpoint of this process that has its name."""
        self._about, self._fold_ends, self._may_publish = about, fold_ends, may_publish
        self.may_remove = True
        """Whether older checkpoints may be removed; False while training has bad steps."""
        self._work, self._queue = work, _Queue(work)
        self._host = HostBuffers() if self._settings.async_save else None
        self._pending: _Pending | None = None
        self._error: str | None = None
        self._thinner = CheckpointRemover(
            self._root, self._settings, fold_ends.iterations, lambda: self.may_remove, work.beat
        )
        self._last = time.monotonic()

    def reason(self, before: TrainingPosition, now: TrainingPosition, is_time: bool) -> str | None:
        """Why to save now, or None; see :func:`reason_to_save`.

        Args:
            before: the moment before the last iteration.
            now: the moment after it.
            is_time: whether to look at the clock. Ranks agree on the first one's, which costs a
                collective: every log interval is often enough.
        """
        minutes = 0.0
        if is_time and self._settings.save_interval_minutes:
            agreed = [(time.monotonic() - self._last) / 60]
            dist.broadcast_object_list(agreed, src=0)
            minutes = agreed[0]
        seq_length = self._about.config.data.seq_length
        ends = self._fold_ends.samples
        return reason_to_save(self._settings, before, now, seq_length, ends, minutes)

    def save(self, state: RunState, progress: SaveProgress) -> None:
        """Save; with ``async_save`` return as soon as everything is copied."""
        began = time.monotonic()
        self._complete(blocking=True)
        self.saved = progress.iteration
        self._last = time.monotonic()
        self._pending = _Pending(progress.iteration, progress.consumed_samples, began)
        try:
            request = plan_save(
                self._root,
                state,
                progress,
                self._about,
                self._may_publish,
                self._host,
                self._work,
            )
            if self._host is not None:
                self._queue.schedule_async_request(request)
            else:
                write_synchronously(request, self._work)
                self._succeed()
        except (OSError, CheckpointException) as error:
            self._fail(error)
        if self._pending is not None:
            self._pending.stall = time.monotonic() - began

    def poll(self) -> None:
        """Complete an asynchronous save if all ranks have written; costs nothing without one."""
        self._complete(blocking=False)

    def wait(self) -> None:
        """Wait for an asynchronous save and complete it, and for the removal of older ones."""
        self._complete(blocking=True)
        self._thinner.wait()

    def close(self, removal_seconds: float = REMOVAL_WAIT_SECONDS) -> None:
        """Wait for the last save.

        Args:
            removal_seconds: how long to wait for the removal of older checkpoints.

        Raises:
            SaveError: the last save failed.
        """
        self._complete(blocking=True)
        self._thinner.wait(removal_seconds)
        if self._error is not None:
            raise SaveError(self._error)

    @property
    def _settings(self) -> CheckpointConfig:
        return self._about.config.checkpoint

    @property
    def _root(self) -> Path:
        return Path(str(self._settings.save))

    def _complete(self, blocking: bool) -> None:
        if self._pending is None:
            return
        try:
            if self._queue.maybe_finalize_async_calls(blocking):
                self._succeed()
        except (OSError, CheckpointException) as error:
            self._fail(error)

    def _succeed(self) -> None:
        assert self._pending is not None
        pending, self._pending, self._error = self._pending, None, None
        self.published_samples = pending.samples
        if dist.get_rank() != 0:
            return
        taken = time.monotonic() - pending.began
        how = f"training waited {pending.stall:.1f} s" if self._host is not None else "synchronous"
        name = self._root / manifests.folder_name(pending.iteration)
        print(f"saved checkpoint {name} in {taken:.1f} s ({how})", flush=True)
        if self.may_remove:
            self._thinner.start(pending.iteration)

    def _fail(self, error: OSError | CheckpointException) -> None:
        """Tell of a save that failed on some rank; every rank knows of it."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._error = f"the checkpoint of iteration {pending.iteration} was not saved"
        if dist.get_rank() != 0:
            return
        self._error += f": {_cause(error)}"
        shutil.rmtree(publish.temporary_folder(self._root, pending.iteration), ignore_errors=True)
        print(
            f"error: {self._error}. Training goes on, and the next save tries again; earlier "
            "checkpoints are untouched",
            file=sys.stderr,
            flush=True,
        )


def _cause(error: OSError | CheckpointException) -> str:
    """One line: what went wrong, and on which rank if not on the first."""
    if isinstance(error, OSError):
        return _of_system(error)
    failures: dict[int, Any] = error.failures
    rank, (first, _) = min(failures.items())
    if isinstance(first, NotFiniteError):
        return f"rank {rank}: {first}"
    what = _of_system(first) if isinstance(first, OSError) else f"{type(first).__name__}: {first}"
    return f"rank {rank}: {what}"


def _of_system(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename else str(error)
