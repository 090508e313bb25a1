"""Number and size of the checkpoints that a run writes and keeps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_llmjp.checkpoint.retention import (
    SaveKind,
    is_llm_jp_iteration,
    removable_iterations,
)
from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.estimate.experts import rank_expert_parameters
from megatron_llmjp.estimate.flops import element_size
from megatron_llmjp.estimate.layout import ParallelLayout


@dataclass(frozen=True)
class CheckpointCounts:
    """Number of checkpoints that a run writes and keeps."""

    written: int
    kept: int
    """At the end of the run: without non-persistent ones, and under ``keep_last``."""


def checkpoint_bytes(config: Config) -> int:
    """Compute the size of a checkpoint: weights, and optimizer state in fp32."""
    return count_parameters(config).total * _saved_bytes_per_parameter(config)


def rank_save_bytes(
    config: Config, layout: ParallelLayout, parameters: int, experts: int = 0
) -> int:
    """Compute the bytes that a rank writes in a save, and copies to host memory with async_save.

    The ranks that hold the same parameters write equal parts.

    Args:
        config: the run's configuration.
        layout: its parallel layout.
        parameters: number of parameters of the rank.
        experts: number of them that belong to experts.
    """
    size = _saved_bytes_per_parameter(config)
    dense = (parameters - experts) * size // layout.copies
    return dense + experts * size // layout.expert_copies


def largest_save(config: Config, layout: ParallelLayout, parameters: Sequence[int]) -> int:
    """Compute the bytes that a rank of the largest stage writes in a save.

    Args:
        config: the run's configuration.
        layout: its parallel layout.
        parameters: number of parameters of a rank of each stage.
    """
    stages = {
        (number, rank_expert_parameters(config, layout, chunks))
        for number, chunks in zip(parameters, layout.stages, strict=False)
    }
    return max(rank_save_bytes(config, layout, *stage) for stage in stages)


def _saved_bytes_per_parameter(config: Config) -> int:
    """Return the size of a weight and its optimizer state in a checkpoint.

    The optimizer state includes fp32 main weights in half precision, and with megatron-core's
    distributed optimizer, which always writes them.
    """
    moments = {"adam": 2, "sgd": 1 if config.optimizer.sgd_momentum else 0}
    copy = element_size(config) < 4 or config.parallel.use_distributed_optimizer
    state = 4 * (moments[config.optimizer.optimizer] + copy)
    return element_size(config) + state


def count_checkpoints(
    config: Config, iterations: int, fold_ends: Sequence[int], step_seconds: float | None
) -> CheckpointCounts:
    """Count the checkpoints of a run that is not interrupted.

    Args:
        config: the run's configuration; a missing save folder does not matter.
        iterations: length of the run.
        fold_ends: consumed samples at the end of each fold.
        step_seconds: duration of a step; None to count no saves that are due by time.
    """
    saves = save_schedule(config, iterations, fold_ends, step_seconds)
    temporary = {iteration for iteration, kind in saves.items() if kind is SaveKind.NON_PERSISTENT}
    sizes = BatchSizeSchedule(config)
    ends = {sizes.iteration_of(end - 1) for end in fold_ends if end}
    removed = removable_iterations(saves, iterations, config.checkpoint, ends, temporary)
    return CheckpointCounts(len(saves), len(saves) - len(removed))


def save_schedule(
    config: Config, iterations: int, fold_ends: Sequence[int], step_seconds: float | None
) -> dict[int, SaveKind]:
    """Return the saves of a run that is not interrupted, by iteration, in ascending order.

    The rules are the trainer's: ``due_save`` and ``timed_save``. The arguments are those of
    :func:`count_checkpoints`.
    """
    policy = config.checkpoint
    persistent = {0, *_persistent_iterations(config, iterations, fold_ends), iterations}
    persistent |= _timed(persistent, policy.save_interval_minutes, step_seconds)
    planned = {*persistent, *_multiples(policy.non_persistent_save_interval, iterations)}
    planned |= _timed(planned, policy.non_persistent_save_minutes, step_seconds)
    kinds = (SaveKind.NON_PERSISTENT, SaveKind.PERSISTENT)
    return {iteration: kinds[iteration in persistent] for iteration in sorted(planned - {0})}


def _persistent_iterations(
    config: Config, iterations: int, fold_ends: Sequence[int]
) -> Iterator[int]:
    """Yield the iterations up to the last one whose checkpoints are kept, in any order."""
    policy, sizes = config.checkpoint, BatchSizeSchedule(config)
    yield from _multiples(policy.save_interval, iterations)
    if policy.save_policy == "llm-jp":
        yield from (i for i in range(1, min(iterations, 1000)) if is_llm_jp_iteration(i))
        yield from _multiples(1000, iterations)
    samples = list(fold_ends) if policy.save_fold_ends else []
    if policy.save_interval_tokens:
        length = config.data.seq_length
        tokens = _multiples(policy.save_interval_tokens, sizes.consumed_after(iterations) * length)
        samples += [-(-end // length) for end in tokens]
    ends = (sizes.iteration_of(end - 1) for end in samples if end > 0)
    yield from (end for end in ends if end <= iterations)


def _multiples(interval: int | None, end: int) -> range:
    return range(interval, end + 1, interval) if interval else range(0)


def _timed(others: Collection[int], minutes: float | None, step_seconds: float | None) -> set[int]:
    """Return the iterations between others at which a save is due by time.

    It is that after which another step would be too late, as in
    :class:`~megatron_llmjp.checkpoint.save_clock.SaveClock`.
    """
    if not minutes or step_seconds is None:
        return set()
    gap = max(1, math.ceil(minutes * 60 / step_seconds) - 1)
    spans = pairwise(sorted(others))
    return {i for last, following in spans for i in range(last + gap, following, gap)}
