"""Policies for saving checkpoints and for removing old ones. Pure functions, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum

from megatron_llmjp.config.schema import CheckpointConfig


class SaveKind(IntEnum):
    """Whether a save is due, and of which kind; of several the greatest takes effect."""

    NONE = 0
    NON_PERSISTENT = 1
    """Removed when a newer checkpoint is complete."""
    PERSISTENT = 2
    """Kept, unless ``keep_last`` removes it."""


@dataclass(frozen=True)
class TrainingPosition:
    """Iteration and consumed samples of a run."""

    iteration: int
    consumed_samples: int


def due_save(
    config: CheckpointConfig,
    before: TrainingPosition,
    now: TrainingPosition,
    seq_length: int,
    fold_ends: Iterable[int] = (),
) -> SaveKind:
    """Return the save that is due after the iteration between ``before`` and ``now``.

    Saves that are due by time are those of :func:`timed_save`.

    Args:
        config: the save policy.
        before: position before the iteration.
        now: position after the iteration.
        seq_length: tokens per sample.
        fold_ends: consumed samples at the end of each fold.
    """
    if config.save is None:
        return SaveKind.NONE
    tokens = config.save_interval_tokens
    old, new = (p.consumed_samples * seq_length // (tokens or 1) for p in (before, now))
    rules = (
        _is_multiple(now.iteration, config.save_interval),
        config.save_policy == "llm-jp" and is_llm_jp_iteration(now.iteration),
        tokens is not None and new > old,
        config.save_fold_ends and ends_a_fold(before, now, fold_ends),
    )
    if any(rules):
        return SaveKind.PERSISTENT
    if _is_multiple(now.iteration, config.non_persistent_save_interval):
        return SaveKind.NON_PERSISTENT
    return SaveKind.NONE


def timed_save(config: CheckpointConfig, minutes: float, persistent_minutes: float) -> SaveKind:
    """Return the save that is due by time.

    Args:
        config: the save policy.
        minutes: training time since the last save.
        persistent_minutes: training time since the last persistent one.
    """
    if config.save is None:
        return SaveKind.NONE
    if config.save_interval_minutes and persistent_minutes >= config.save_interval_minutes:
        return SaveKind.PERSISTENT
    if config.non_persistent_save_minutes and minutes >= config.non_persistent_save_minutes:
        return SaveKind.NON_PERSISTENT
    return SaveKind.NONE


def _is_multiple(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def ends_a_fold(before: TrainingPosition, now: TrainingPosition, fold_ends: Iterable[int]) -> bool:
    """Whether an iteration trained on the last sample of a fold.

    The remaining samples of the iteration may be from the next fold.
    """
    return any(before.consumed_samples < end <= now.consumed_samples for end in fold_ends)


def is_llm_jp_iteration(iteration: int) -> bool:
    """Whether LLM-jp's policy saves: 1..9, 10..90 by 10, 100..900 by 100, then every 1000."""
    step = 1
    while step < 1000 and iteration >= 10 * step:
        step *= 10
    return iteration % step == 0


def removable_iterations(
    saved: Iterable[int],
    newest_good: int,
    config: CheckpointConfig,
    fold_ends: Collection[int],
    non_persistent: Collection[int] = (),
) -> list[int]:
    """Return the iterations whose checkpoints the policy removes, oldest first.

    ``newest_good`` and newer ones are always kept: they may belong to another run or be damaged.

    Args:
        saved: iterations of the checkpoints in the folder.
        newest_good: the iteration just saved and verified.
        config: the retention policy.
        fold_ends: iterations that ended a fold; kept when ``save_fold_ends`` is set.
        non_persistent: iterations of non-persistent checkpoints; ``keep_last`` does not count them.
    """
    old = sorted(iteration for iteration in saved if iteration < newest_good)
    temporary = [iteration for iteration in old if iteration in non_persistent]
    if config.keep_last is None:
        return temporary
    old = [iteration for iteration in old if iteration not in non_persistent]
    others = config.keep_last - (newest_good not in non_persistent)
    recent = set(old[max(0, len(old) - others) :])

    def is_kept(iteration: int) -> bool:
        return (
            iteration in recent
            or bool(config.keep_every and iteration % config.keep_every == 0)
            or (config.save_fold_ends and iteration in fold_ends)
        )

    return sorted([*temporary, *(iteration for iteration in old if not is_kept(iteration))])
