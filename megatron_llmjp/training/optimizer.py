"""megatron-core's optimizer and data-parallel wrapper for a model, and the parameter norm."""

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
from megatron_llmjp.patches.bucket_padding import keep_bucket_padding
from megatron_llmjp.patches.fused_adamw import register_fused_adamw
from megatron_llmjp.patches.missing_moments import create_missing_moments


@torch.no_grad()
def parameter_norm(optimizer: Any) -> float:
    """Return the L2 norm of the fp32 parameters that the optimizer updates; all ranks call it.

    Each rank sums the parameters that it owns, and megatron-core reduces over the same ranks as for
    the gradient norm: tied embeddings and parameters that tensor-parallel ranks share count once,
    and all shards of the distributed optimizer are included.
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
