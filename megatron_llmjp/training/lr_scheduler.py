"""The learning rate and weight decay as functions of the samples trained on.

The curves are megatron-core's ``OptimizerParamScheduler``, which counts samples. One of them spans
the run; a fold with a ``learning_rate`` of its own has another that begins at its first iteration.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schedule import Schedule
from megatron_llmjp.data.lr_schedule import SchedulerSettings, learning_rate_settings


@dataclass(frozen=True)
class _Piece:
    """Samples ``[first, end)`` with a curve of their own, whose steps count from ``first``."""

    first: int
    end: int
    curve: OptimizerParamScheduler


class LearningRates:
    """The rate that each iteration applies, whether or not the run is ever started.

    An iteration has the rate of the fold that its first sample is in.

    Args:
        config: the resolved configuration.
        schedule: the resolved folds.
        batch_sizes: which iteration has how many samples.
        train_iters: where the run ends, and a decay without an end of its own.

    Raises:
        UserError: a schedule contradicts itself.
    """

    def __init__(
        self, config: Config, schedule: Schedule, batch_sizes: BatchSizeSchedule, train_iters: int
    ) -> None:
        self._sizes = batch_sizes
        settings = learning_rate_settings(config, schedule, batch_sizes, train_iters)
        self.settings = settings.run
        """Of the curve that spans the run."""
        self._run = _curve(settings.run)
        self._pieces = [_Piece(start, end, _curve(own)) for start, end, own in settings.folds]

    def at(self, iteration: int) -> float:
        """The rate that iteration ``iteration`` (from 1) applies."""
        return self.after(self._sizes.consumed_after(iteration - 1))

    def after(self, samples: int) -> float:
        """The rate of the step that follows ``samples`` samples."""
        curve = self._run
        place = bisect.bisect_right(self._pieces, samples, key=lambda piece: piece.first)
        if place > 0 and samples < self._pieces[place - 1].end:
            curve = self._pieces[place - 1].curve
            samples -= self._pieces[place - 1].first
        curve.num_steps = samples
        return float(curve.get_lr({}))


class RunScheduler(OptimizerParamScheduler):
    """megatron-core's scheduler on an optimizer, with the folds' own learning rates.

    ``num_steps`` counts samples; as in Megatron-LM it stays behind when fp16 skips a step.
    """

    def __init__(self, optimizer: Any, rates: LearningRates) -> None:
        self._rates = rates
        super().__init__(optimizer, **rates.settings)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """The rate of the next step, which is the same for all parameters."""
        return self._rates.after(self.num_steps)


def _curve(settings: SchedulerSettings) -> OptimizerParamScheduler:
    """megatron-core's scheduler without an optimizer, to be asked for values."""
    return OptimizerParamScheduler(SimpleNamespace(param_groups=[]), **settings)
