"""When a checkpoint is saved, and which old ones are removed. Pure functions, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from megatron_llmjp.config.schema import CheckpointConfig


@dataclass(frozen=True)
class TrainingPosition:
    """A point of a run, after an iteration."""

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
    """Why the iteration that led from ``before`` to ``now`` is one to save after.

    Args:
        config: the policy.
        before: the moment before the iteration.
        now: the moment after it.
        seq_length: tokens per sample.
        fold_ends: samples trained on when each fold ends.
        minutes: time since the last save. Clocks of ranks differ: pass the first rank's to all.

    Returns:
        A word for the log, or None when nothing asks for a checkpoint.
    """
    if config.save is None:
        return None
    if config.save_interval and now.iteration % config.save_interval == 0:
        return f"every {config.save_interval} iterations"
    if config.save_policy == "llm-jp" and is_llm_jp_iteration(now.iteration):
        return "LLM-jp's pattern"
    if config.save_interval_tokens:
        old, new = (
            moment.consumed_samples * seq_length // config.save_interval_tokens
            for moment in (before, now)
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

    An iteration may take its last samples from the next fold; it ends the first one all the same.
    """
    return any(before.consumed_samples < end <= now.consumed_samples for end in fold_ends)


def is_llm_jp_iteration(iteration: int) -> bool:
    """LLM-jp's pattern: 1..9, 10..90 by 10, 100..900 by 100, then every 1000."""
    step = 1
    while step < 1000 and iteration >= 10 * step:
        step *= 10
    return iteration % step == 0


def removable_iterations(
    saved: Iterable[int], newest_good: int, config: CheckpointConfig, fold_ends: Collection[int]
) -> list[int]:
    """Iterations whose checkpoints are no longer wanted, oldest first.

    Never ``newest_good`` nor any that is newer: those are another run's, or not known to be whole.

    Args:
        saved: iterations of the checkpoints in the folder.
        newest_good: the iteration just saved and verified.
        config: the policy.
        fold_ends: iterations that ended a fold; kept when ``save_fold_ends`` is set.
    """
    if config.keep_last is None:
        return []
    old = sorted(iteration for iteration in saved if iteration < newest_good)
    recent = set(old[max(0, len(old) - (config.keep_last - 1)) :])

    def is_wanted(iteration: int) -> bool:
        return (
            iteration in recent
            or bool(config.keep_every and iteration % config.keep_every == 0)
            or (config.save_fold_ends and iteration in fold_ends)
        )

    return [iteration for iteration in old if not is_wanted(iteration)]
