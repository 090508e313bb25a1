"""megatron-core's optimizer, data-parallel wrapper and learning-rate scheduler; parameter norm.

Learning rate and weight decay are functions of the number of consumed samples, computed by
megatron-core's ``OptimizerParamScheduler``, whose steps are samples. One scheduler spans the run; a
fold with its own ``learning_rate`` has another one, which starts at the fold's first iteration.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import Float16Module, param_is_not_shared

from megatron_llmjp.config.lr_decay_styles import DECAY_STYLES
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schedule import Schedule
from megatron_llmjp.data.lr_schedule import SchedulerSettings, learning_rate_settings
from megatron_llmjp.model.gpt import params_dtype
from megatron_llmjp.patches.foreach_norm import use_foreach_kernels
from megatron_llmjp.patches.fused_adamw import register_fused_adamw
from megatron_llmjp.patches.optimizer_shards import shard_by_rank


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


@torch.no_grad()
def parameter_norm(optimizer: Any) -> float:
    """Return the L2 norm of the fp32 parameters that the optimizer updates; all ranks call it.

    Each rank sums the parameters that it owns, and megatron-core reduces over the same ranks as for
    the gradient norm: tied embeddings and parameters that tensor-parallel ranks share count once,
    and all shards of the distributed optimizer are included. Experts have an optimizer of their
    own, whose parameters are divided among other ranks.
    """
    return math.hypot(
        *(
            float(get_grad_norm_fp32(_owned(part), 2, part.get_grad_stats_parallel_group()))
            for part in getattr(optimizer, "chained_optimizers", [optimizer])
        )
    )


def _owned(part: Any) -> list[Any]:
    """Return the parameters of an optimizer that no other rank counts."""
    return [
        parameter.detach()
        for parameter in part.get_parameters()
        if parameter.numel() > 0
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter)
    ]


def wrap_half_precision(chunks: list[Any], config: Config) -> list[Any]:
    """Wrap the chunks in ``Float16Module`` if the run computes in bf16 or fp16."""
    if config.training.bf16 or config.training.fp16:
        return [Float16Module(chunk.config, chunk) for chunk in chunks]
    return chunks


def wrap_for_data_parallel(chunks: list[Any], config: Config) -> list[Any]:
    """Wrap model chunks so that their gradients are reduced over the data-parallel group."""
    chunks = wrap_half_precision(chunks, config)
    parallel = config.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.bf16 or config.training.fp16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the gradient monitor checks the norm of each step instead
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            ddp,
            chunk,
            # Gradients of the first chunk are ready last: bucketing the others overlaps nothing.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(chunks: list[Any], config: Config) -> Any:
    """Return megatron-core's optimizer, with the distributed optimizer if configured."""
    register_fused_adamw()
    use_foreach_kernels()
    o = config.optimizer
    settings = core_optimizer.OptimizerConfig(
        optimizer=o.optimizer,
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_eps=o.adam_eps,
        sgd_momentum=o.sgd_momentum,
        clip_grad=o.clip_grad,
        bf16=config.training.bf16,
        fp16=config.training.fp16,
        params_dtype=params_dtype(config),
        loss_scale=o.loss_scale,
        initial_loss_scale=o.initial_loss_scale,
        min_loss_scale=o.min_loss_scale,
        loss_scale_window=o.loss_scale_window,
        hysteresis=o.hysteresis,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    optimizer = core_optimizer.get_megatron_optimizer(
        settings,
        chunks,
        core_optimizer.get_standard_config_overrides(settings),
        use_gloo_process_groups=False,
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, distrib_optimizer.DistributedOptimizer):
            shard_by_rank(part)
    return optimizer


def apply_config_after_load(optimizer: Any, scheduler: Any, config: Config) -> None:
    """Overwrite the loaded hyperparameters with those of the configuration.

    Loading a checkpoint restores all values of megatron-core's parameter groups, which would
    override the configuration. Values to be kept from the checkpoint are already part of the
    resolved configuration.
    """
    o = config.optimizer
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = o.lr, o.min_lr  # unused, but saved
        if o.optimizer == "adam":
            group["betas"], group["eps"] = (o.adam_beta1, o.adam_beta2), o.adam_eps
        if "start_wd" in group:
            group["start_wd"] = group["end_wd"] = o.weight_decay
    scheduler.step(0)


def gather_parameters(chunks: list[Any], config: Config) -> None:
    """Gather the parameters that the last step updated, so that every rank has current values.

    With ``overlap_param_gather``, parameters that other ranks own are one step old until the next
    forward pass and must not be saved.
    """
    if config.parallel.overlap_param_gather:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
