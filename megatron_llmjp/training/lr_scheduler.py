"""Learning rate and weight decay as functions of the number of consumed samples.

They are computed by megatron-core's ``OptimizerParamScheduler``, whose steps are samples. One
scheduler spans the run; a fold with its own ``learning_rate`` has another one, which starts at the
first iteration of the fold.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_llmjp.config.lr_decay_styles import DECAY_STYLES
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schedule import Schedule
from megatron_llmjp.data.lr_schedule import SchedulerSettings, learning_rate_settings


@dataclass(frozen=True)
class _FoldSchedule:
    """Scheduler of one fold, for samples ``[first, end)``; its steps count from ``first``."""

    first: int
    end: int
    scheduler: OptimizerParamScheduler


class _DecayScheduler(OptimizerParamScheduler):
    """megatron-core's scheduler, with the decay styles that megatron-core does not have."""

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the learning rate of the next step."""
        factor = DECAY_STYLES[self.lr_decay_style].factor
        in_warmup = self.lr_warmup_steps > 0 and self.num_steps <= self.lr_warmup_steps
        if factor is None or in_warmup or self.num_steps > self.lr_decay_steps:
            return float(super().get_lr(param_group))
        decay_steps = self.lr_decay_steps - self.lr_warmup_steps
        weight = factor((self.num_steps - self.lr_warmup_steps) / decay_steps)
        return float(self.min_lr + weight * (self.max_lr - self.min_lr))


class LearningRateSchedule:
    """Learning rate of every iteration of a run, computed without an optimizer.

    An iteration uses the learning rate of the fold that contains its first sample.

    Args:
        config: the resolved configuration.
        schedule: the resolved folds.
        batch_sizes: the batch size of each iteration.
        train_iters: length of the run, and of a decay without its own end.

    Raises:
        UserError: the settings of a schedule are invalid.
    """

    def __init__(
        self, config: Config, schedule: Schedule, batch_sizes: BatchSizeSchedule, train_iters: int
    ) -> None:
        self._sizes = batch_sizes
        settings = learning_rate_settings(config, schedule, batch_sizes, train_iters)
        self.settings = settings.run
        """Scheduler arguments of the whole run."""
        self._run = _scheduler(settings.run)
        self._folds = [
            _FoldSchedule(start, end, _scheduler(own)) for start, end, own in settings.folds
        ]

    def at(self, iteration: int) -> float:
        """Return the learning rate of an iteration, counted from 1."""
        return self.after(self._sizes.consumed_after(iteration - 1))

    def after(self, samples: int) -> float:
        """Return the learning rate of the step after ``samples`` consumed samples."""
        scheduler = self._run
        index = bisect.bisect_right(self._folds, samples, key=lambda fold: fold.first)
        if index > 0 and samples < self._folds[index - 1].end:
            scheduler = self._folds[index - 1].scheduler
            samples -= self._folds[index - 1].first
        scheduler.num_steps = samples
        return float(scheduler.get_lr({}))


class RunScheduler(OptimizerParamScheduler):
    """megatron-core's scheduler of an optimizer, with the learning rates of the folds.

    ``num_steps`` counts samples; as in Megatron-LM it does not advance when a step is skipped.
    """

    def __init__(self, optimizer: Any, rates: LearningRateSchedule) -> None:
        self._rates = rates
        super().__init__(optimizer, **rates.settings)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the learning rate of the next step, which is the same for all parameters."""
        return self._rates.after(self.num_steps)


def _scheduler(settings: SchedulerSettings) -> _DecayScheduler:
    """Return a scheduler without an optimizer."""
    return _DecayScheduler(SimpleNamespace(param_groups=[]), **settings)
