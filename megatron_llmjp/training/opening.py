"""What a run does before its process groups: take its save folder, and look over its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint import lock as locks
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.lock import RunLock
from megatron_llmjp.checkpoint.resume import Resume
from megatron_llmjp.errors import RunError, UserError
from megatron_llmjp.prepare import Run, prepare
from megatron_llmjp.runtime.distributed import exchange
from megatron_llmjp.runtime.ranks import Ranks
from megatron_llmjp.system import warn

LOOKS = (0, 1, 5, 20)
"""Seconds before each look, while ranks find different checkpoints."""


@dataclass(frozen=True)
class Opened:
    """A run that may begin."""

    run: Run
    may_publish: Callable[[], None]
    """Raises when another run has taken the save folder."""


@contextmanager
def opened(run: Run, ranks: Ranks, store: Any, beat: Callable[[], None]) -> Iterator[Opened]:
    """Hold the run's save folder, with a checkpoint to go on from whose checksums are right.

    Checksums are compared when ``verify_checkpoint`` asks for it, or when the last run in the save
    folder ended without closing: each rank reads a share of the files. A damaged checkpoint is
    passed over for the one before.

    Args:
        run: the run as it was prepared.
        ranks: this process's place.
        store: shared by all ranks.
        beat: called after each file that was read.

    Raises:
        UserError: another run holds the folder, or no checkpoint is whole.
        RunError: the file system of the folder does not answer.
    """
    with ExitStack() as stack:
        lock, was_killed = _take_folder(run, ranks, store, stack)
        run = _with_one_checkpoint(run, ranks, store)
        if was_killed or run.config.checkpoint.verify_checkpoint:
            run = _with_good_checkpoint(run, ranks, store, beat)
        yield Opened(run, lock.check if lock is not None else _always)


def _always() -> None:
    """Other ranks than the first publish nothing."""


def _take_folder(
    run: Run, ranks: Ranks, store: Any, stack: ExitStack
) -> tuple[RunLock | None, bool]:
    """The lock on the first rank; and, for all, whether the last run was killed."""
    save = run.config.checkpoint.save
    if save is None or run.config.training.eval_only:
        return None, False
    lock, answer = None, {"mistake": "", "failure": "", "was_killed": False}
    if ranks.is_first:
        try:
            lock = stack.enter_context(locks.taken(Path(save), warn))
            answer["was_killed"] = lock.left_by is not None
        except UserError as error:
            answer["mistake"] = str(error)
        except RunError as error:
            answer["failure"] = str(error)
    first = exchange(store, ranks, "save folder", answer)[0]
    if first["mistake"]:
        raise UserError(first["mistake"])
    if first["failure"]:
        raise RunError(first["failure"])
    return lock, first["was_killed"]


def _with_one_checkpoint(run: Run, ranks: Ranks, store: Any) -> Run:
    """The run, going on from the same checkpoint on all ranks.

    Some may have looked before the last run in the folder published its last one, some after; or
    their machines' views of a network file system differ for a while.

    Raises:
        RunError: their views stay different.
    """
    for pause in LOOKS:
        if pause:
            time.sleep(pause)
            run = prepare(run.asked, ranks.world_size)
        chosen = str(run.resume.folder) if run.resume is not None else "no checkpoint"
        seen = exchange(store, ranks, f"resume, {pause} s", chosen)
        if len(set(seen)) == 1:
            return run
    views = ", ".join(f"rank {seen.index(folder)}: {folder}" for folder in sorted(set(seen)))
    raise RunError(
        f"ranks find different checkpoints to resume from ({views}); start the run again"
    )


def _with_good_checkpoint(run: Run, ranks: Ranks, store: Any, beat: Callable[[], None]) -> Run:
    """The run, going on from the newest checkpoint whose checksums are right."""
    damaged: dict[str, str] = {}
    while run.resume is not None:
        own = _problems(run.resume, ranks, beat)
        found = exchange(store, ranks, f"verify {run.resume.folder}", own)
        problems = [problem for part in found for problem in part]
        if not problems:
            if ranks.is_first:
                print(f"checksums of {run.resume.folder} are right", flush=True)
            return run
        damaged[str(run.resume.folder)] = problems[0]
        if ranks.is_first:
            warn(f"damaged checkpoint: {problems[0]}")
        run = prepare(run.asked, ranks.world_size, damaged)
    return run


def _problems(resume: Resume, ranks: Ranks, beat: Callable[[], None]) -> list[str]:
    """What is wrong with this rank's share of the files."""
    found = []
    for name in sorted(resume.manifest.files)[ranks.rank :: ranks.world_size]:
        alone = resume.manifest.model_copy(update={"files": {name: resume.manifest.files[name]}})
        found += manifests.problems(resume.folder, alone, checksums=True)
        beat()
    return found
