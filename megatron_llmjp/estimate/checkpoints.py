"""Estimated checkpoints of a run: size, number written and number kept."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.checkpoint.retention import (
    TrainingPosition,
    reason_to_save,
    removable_iterations,
)
from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.estimate.memory import element_size


@dataclass(frozen=True)
class CheckpointCounts:
    """Number of checkpoints that a run writes and keeps."""

    written: int
    kept: int
    """At the end of the run, under ``keep_last`` and ``keep_every``."""


def checkpoint_bytes(config: Config) -> int:
    """Compute the size of a checkpoint: weights, and optimizer state in fp32.

    The optimizer state includes fp32 main weights in half precision, and with megatron-core's
    distributed optimizer, which always writes them.
    """
    moments = {"adam": 2, "sgd": 1 if config.optimizer.sgd_momentum else 0}
    copy = element_size(config) < 4 or config.parallel.use_distributed_optimizer
    state = 4 * (moments[config.optimizer.optimizer] + copy)
    return count_parameters(config).total * (element_size(config) + state)


def count_checkpoints(
    config: Config, iterations: int, fold_ends: tuple[int, ...], step_seconds: float
) -> CheckpointCounts:
    """Count the checkpoints by applying the trainer's save rule to every iteration.

    Args:
        config: the run's configuration.
        iterations: length of the run.
        fold_ends: consumed samples at the end of each fold.
        step_seconds: duration of a step, for ``save_interval_minutes``.
    """
    policy, sizes = config.checkpoint, BatchSizeSchedule(config)
    rules = (policy.save_interval, policy.save_policy, policy.save_interval_tokens)
    if not any((*rules, policy.save_interval_minutes, fold_ends)):
        return CheckpointCounts(1, 1)
    policy = policy.model_copy(update={"save": policy.save or "somewhere"})
    saved, before = [0], TrainingPosition(0, 0)
    for iteration in range(1, iterations + 1):
        consumed = before.consumed_samples
        now = TrainingPosition(iteration, consumed + sizes.at(consumed))
        minutes = (iteration - saved[-1]) * step_seconds / 60
        if reason_to_save(policy, before, now, config.data.seq_length, fold_ends, minutes):
            saved.append(iteration)
        before = now
    written = sorted({*saved[1:], iterations})
    ends = {sizes.iteration_of(end - 1) for end in fold_ends if end}
    return CheckpointCounts(
        len(written), len(written) - len(removable_iterations(written, iterations, policy, ends))
    )
