"""Policies for saving checkpoints and for removing old ones. Pure functions, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from megatron_llmjp.config.schema import CheckpointConfig


@dataclass(frozen=True)
class TrainingPosition:
    """Iteration and consumed samples of a run."""

    iteration: int
    consumed_samples: int


def reason_to_save(
    config: CheckpointConfig,
    before: TrainingPosition,
    now: TrainingPosition,
    seq_length: int,
    fold_ends: Iterable[int] = (),
    minutes: float = 0.0,
) -> str | None:
    """Return why a checkpoint is due after the iteration between ``before`` and ``now``.

    Args:
        config: the save policy.
        before: position before the iteration.
        now: position after the iteration.
        seq_length: tokens per sample.
        fold_ends: consumed samples at the end of each fold.
        minutes: time since the last save, which must be the same on all ranks: broadcast rank 0's.

    Returns:
        The reason for the log, or None if no checkpoint is due.
    """
    if config.save is None:
        return None
    if config.save_interval and now.iteration % config.save_interval == 0:
        return f"every {config.save_interval} iterations"
    if config.save_policy == "llm-jp" and is_llm_jp_iteration(now.iteration):
        return "LLM-jp's pattern"
    if config.save_interval_tokens:
        old, new = (
            position.consumed_samples * seq_length // config.save_interval_tokens
            for position in (before, now)
        )
        if new > old:
            return f"every {config.save_interval_tokens} tokens"
    if config.save_fold_ends and ends_a_fold(before, now, fold_ends):
        return "end of a fold"
    if config.save_interval_minutes and minutes >= config.save_interval_minutes:
        return f"every {config.save_interval_minutes:g} minutes"
    return None


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
    saved: Iterable[int], newest_good: int, config: CheckpointConfig, fold_ends: Collection[int]
) -> list[int]:
    """Return the iterations whose checkpoints the policy removes, oldest first.

    ``newest_good`` and newer ones are always kept: they may belong to another run or be damaged.

    Args:
        saved: iterations of the checkpoints in the folder.
        newest_good: the iteration just saved and verified.
        config: the retention policy.
        fold_ends: iterations that ended a fold; kept when ``save_fold_ends`` is set.
    """
    if config.keep_last is None:
        return []
    old = sorted(iteration for iteration in saved if iteration < newest_good)
    recent = set(old[max(0, len(old) - (config.keep_last - 1)) :])

    def is_kept(iteration: int) -> bool:
        return (
            iteration in recent
            or bool(config.keep_every and iteration % config.keep_every == 0)
            or (config.save_fold_ends and iteration in fold_ends)
        )

    return [iteration for iteration in old if not is_kept(iteration)]
