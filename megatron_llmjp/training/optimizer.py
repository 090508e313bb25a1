"""megatron-core's optimizer and data-parallel wrapper for a model.

The norm of all parameters.

megatron-core's optimizer and data-parallel wrapper for a model.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import Float16Module, param_is_not_shared

from megatron_llmjp.config.schema import Config
from megatron_llmjp.model.gpt import params_dtype
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.patches.bucket_padding import keep_bucket_padding
from megatron_llmjp.patches.fused_adamw import register_fused_adamw
from megatron_llmjp.patches.missing_moments import create_missing_moments


@torch.no_grad()
def parameter_norm(optimizer: Any) -> float:
    """L2 norm of the fp32 parameters that the optimizer updates; all ranks call it.

    Each rank sums what it owns, and megatron-core adds up over the same ranks as for the gradient
    norm: tied embeddings and what tensor-parallel ranks share count once, the distributed
    optimizer's shards all together.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    owned = [
        parameter.detach()
        for part in parts
        for parameter in part.get_parameters()
        if parameter.numel() > 0
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter)
    ]
    return float(get_grad_norm_fp32(owned, 2, optimizer.get_grad_stats_parallel_group()))


def half_precision(chunks: list[Any], config: Config) -> list[Any]:
    """Have the chunks compute in bf16 or fp16 where the run does."""
    if config.training.bf16 or config.training.fp16:
        return [Float16Module(chunk.config, chunk) for chunk in chunks]
    return chunks


def wrap_for_data_parallel(chunks: list[Any], config: Config, device: Device) -> list[Any]:
    """Wrap model chunks so that their gradients are reduced over the data-parallel group."""
    chunks = half_precision(chunks, config)
    parallel = config.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.bf16 or config.training.fp16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the step's gradient norm is checked instead, once
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            ddp,
            chunk,
            # The first chunk's gradients come last: bucketing the others overlaps nothing.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def make_optimizer(chunks: list[Any], config: Config, device: Device) -> Any:
    """The optimizer of megatron-core, distributed over data-parallel ranks if asked for."""
    register_fused_adamw()
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
            create_missing_moments(part)
            keep_bucket_padding(part)
    return optimizer


def apply_configuration(optimizer: Any, scheduler: Any, config: Config) -> None:
    """After a load, make the configuration's values hold.

    megatron-core restores the parameter groups whole, and their old learning rates win over the
    configuration. What is to be kept from the checkpoint is in the configuration already.
    """
    o = config.optimizer
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = o.lr, o.min_lr  # of no effect, but told in the next one
        if o.optimizer == "adam":
            group["betas"], group["eps"] = (o.adam_beta1, o.adam_beta2), o.adam_eps
        if "start_wd" in group:
            group["start_wd"] = group["end_wd"] = o.weight_decay
    scheduler.step(0)


def complete_parameters(chunks: list[Any], config: Config) -> None:
    """Gather what the last step updated, so that every rank holds every parameter.

    With an overlapped gather, parameters that other ranks own are one step old until the next
    forward pass: a checkpoint must not take them.
    """
    if config.parallel.overlap_param_gather:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
