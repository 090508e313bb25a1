"""Checkpoints of a run on paper: how many it writes, how many stay, how large each is."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.checkpoint.retention import Moment, reason_to_save, removable
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.estimate.memory import element_size
from megatron_llmjp.estimate.parameters import count_parameters


@dataclass(frozen=True)
class Checkpoints:
    """What a run leaves on disk."""

    written: int
    kept: int
    """At the end, by ``keep_last`` and ``keep_every``."""


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint: weights, and the optimizer's state in fp32.

    The state holds a copy of the weights where it is a main copy (half precision) or where
    megatron-core's distributed optimizer writes it.
    """
    moments = {"adam": 2, "sgd": 1 if config.optimizer.sgd_momentum else 0}
    copy = element_size(config) < 4 or config.parallel.use_distributed_optimizer
    state = 4 * (moments[config.optimizer.optimizer] + copy)
    return count_parameters(config).total * (element_size(config) + state)


def count_checkpoints(
    config: Config, iterations: int, fold_ends: tuple[int, ...], step_seconds: float
) -> Checkpoints:
    """Go through a run with the trainer's own rule for saving.

    Args:
        config: the run.
        iterations: its length.
        fold_ends: samples trained on when each fold ends.
        step_seconds: for those that are saved by the clock.
    """
    policy, sizes = config.checkpoint, BatchSizeSchedule(config)
    rules = (policy.save_interval, policy.save_policy, policy.save_interval_tokens)
    if not any((*rules, policy.save_interval_minutes, fold_ends)):
        return Checkpoints(1, 1)
    policy = policy.model_copy(update={"save": policy.save or "somewhere"})
    saved, before = [0], Moment(0, 0)
    for iteration in range(1, iterations + 1):
        consumed = before.consumed_samples
        now = Moment(iteration, consumed + sizes.at(consumed))
        minutes = (iteration - saved[-1]) * step_seconds / 60
        if reason_to_save(policy, before, now, config.data.seq_length, fold_ends, minutes):
            saved.append(iteration)
        before = now
    written = sorted({*saved[1:], iterations})
    ends = {sizes.iteration_of(end - 1) for end in fold_ends if end}
    return Checkpoints(
        len(written), len(written) - len(removable(written, iterations, policy, ends))
    )
