"""Synchronous and asynchronous saves during a run, their log lines, and removal of old checkpoints.

A failed save does not end the run: its cause is printed, training continues, and the next save is a
new attempt. Only the last save must succeed (:meth:`Saver.close`).
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
from megatron_llmjp.checkpoint.host_copy import HostBuffers
from megatron_llmjp.checkpoint.removal import REMOVAL_WAIT_SECONDS, CheckpointRemover
from megatron_llmjp.checkpoint.retention import SaveKind, TrainingPosition, due_save
from megatron_llmjp.checkpoint.save import (
    RunDescription,
    SaveProgress,
    plan_save,
    write_synchronously,
)
from megatron_llmjp.checkpoint.sharded_state import RunState
from megatron_llmjp.checkpoint.writer import NotFiniteError, ThreadAsyncCaller
from megatron_llmjp.config.schema import CheckpointConfig
from megatron_llmjp.errors import RunError
from megatron_llmjp.parallel.process_groups import DEFAULT_RANK_SYNC, RankSync


class SaveError(RunError):
    """The run's last checkpoint could not be saved."""


@dataclass(frozen=True)
class FoldEnds:
    """Ends of the folds of a run."""

    samples: tuple[int, ...] = ()
    """Consumed samples at the end of each fold."""
    iterations: frozenset[int] = frozenset()
    """Last iteration of each fold."""


@dataclass
class _Pending:
    """A save in progress."""

    iteration: int
    samples: int
    began: float
    stall: float = 0.0
    """Seconds that training was blocked."""


class _Queue(AsyncCallsQueue):
    """megatron-core's queue of asynchronous saves, with threads instead of forked processes."""

    def __init__(self, sync: RankSync) -> None:
        super().__init__()
        self._sync = sync

    def _get_async_caller(self) -> ThreadAsyncCaller:
        return ThreadAsyncCaller(self._sync)


class Saver:
    """Saves the checkpoints of a run; its methods are collectives."""

    def __init__(
        self,
        about: RunDescription,
        fold_ends: FoldEnds,
        may_publish: Callable[[], None],
        iteration: int,
        sync: RankSync = DEFAULT_RANK_SYNC,
    ) -> None:
        """Initialize without saving.

        Args:
            about: configuration and tokenizer files of the run.
            fold_ends: ends of its folds.
            may_publish: raises if another run has acquired the save folder.
            iteration: first iteration of this process.
            sync: heartbeats, and barriers without a timeout.
        """
        self.saved = iteration
        """Iteration of the newest save that was started, or the first iteration."""
        self.published_samples: int | None = None
        """Consumed samples of the newest checkpoint that this process has published."""
        self._about, self._fold_ends, self._may_publish = about, fold_ends, may_publish
        self.may_remove = True
        """Whether old checkpoints may be removed; false during bad steps."""
        self._sync, self._queue = sync, _Queue(sync)
        self._host = HostBuffers() if self._settings.async_save else None
        self._pending: _Pending | None = None
        self._error: str | None = None
        self._remover = CheckpointRemover(
            self._root, self._settings, fold_ends.iterations, lambda: self.may_remove, sync.beat
        )

    def due(self, before: TrainingPosition, now: TrainingPosition) -> SaveKind:
        """Return the save that is due after an iteration; see :func:`due_save`."""
        seq_length = self._about.config.data.seq_length
        return due_save(self._settings, before, now, seq_length, self._fold_ends.samples)

    @property
    def is_writing(self) -> bool:
        """Whether an asynchronous save is not complete; the same on all ranks."""
        return self._pending is not None

    def save(self, state: RunState, progress: SaveProgress) -> None:
        """Save a checkpoint.

        With ``async_save``, return while the tensors are being copied to host memory: call
        :meth:`hold_update` before they are changed.
        """
        began = time.monotonic()
        self._complete(blocking=True)
        self.saved = progress.iteration
        self._pending = _Pending(progress.iteration, progress.consumed_samples, began)
        try:
            request = plan_save(
                self._root,
                state,
                progress,
                self._about,
                self._may_publish,
                self._host,
                self._sync,
            )
            if self._host is not None:
                self._queue.schedule_async_request(request)
            else:
                write_synchronously(request, self._sync)
                self._succeed()
        except (OSError, CheckpointException) as error:
            self._fail(error)
        if self._pending is not None:
            self._pending.stall = time.monotonic() - began

    def hold_update(self) -> None:
        """Let an update of the saved tensors wait on the device until they are copied."""
        if self._host is not None:
            self._host.hold_device()

    def poll(self) -> None:
        """Finalize an asynchronous save if all ranks have written their files."""
        self._complete(blocking=False)

    def wait(self) -> None:
        """Wait for an asynchronous save and its finalization, and for the removal of old ones."""
        self._complete(blocking=True)
        self._remover.wait()

    def close(self, removal_seconds: float = REMOVAL_WAIT_SECONDS) -> None:
        """Wait for the last save.

        Args:
            removal_seconds: time to wait for the removal of old checkpoints.

        Raises:
            SaveError: the last save failed.
        """
        self._complete(blocking=True)
        self._remover.wait(removal_seconds)
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
        seconds = time.monotonic() - pending.began
        mode = f"training waited {pending.stall:.1f} s" if self._host is not None else "synchronous"
        name = self._root / manifests.folder_name(pending.iteration)
        print(f"saved checkpoint {name} in {seconds:.1f} s ({mode})", flush=True)
        if self.may_remove:
            self._remover.start(pending.iteration)

    def _fail(self, error: OSError | CheckpointException) -> None:
        """Handle a save that failed on any rank; called on all ranks. Rank 0 prints the cause."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._error = f"the checkpoint of iteration {pending.iteration} was not saved"
        if dist.get_rank() != 0:
            return
        self._error += f": {_cause(error)}"
        shutil.rmtree(publish.temporary_folder(self._root, pending.iteration), ignore_errors=True)
        print(
            f"error: {self._error}. Training continues, and the next save tries again; earlier "
            "checkpoints are unchanged",
            file=sys.stderr,
            flush=True,
        )


def _cause(error: OSError | CheckpointException) -> str:
    """Describe the error in one line, with its rank unless the error is rank 0's ``OSError``."""
    if isinstance(error, OSError):
        return _describe_os_error(error)
    failures: dict[int, Any] = error.failures
    rank, (first, _) = min(failures.items())
    if isinstance(first, NotFiniteError):
        return f"rank {rank}: {first}"
    text = (
        _describe_os_error(first)
        if isinstance(first, OSError)
        else f"{type(first).__name__}: {first}"
    )
    return f"rank {rank}: {text}"


def _describe_os_error(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename else str(error)
