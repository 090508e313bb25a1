"""The optimizer step: forward and backward over all micro-batches, reduce, clip, update.

Losses stay on the device: the host synchronizes once per step, where the gradient norm is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataloader import LOSS_TOKENS, Batch
from megatron_llmjp.data.documents import DOCUMENT_BOUNDARIES
from megatron_llmjp.filesystem import no_heartbeat

BatchIterator = Iterator[Batch]

LM_LOSS_ROW, Z_LOSS_ROW, FIRST_DATASET_ROW = 0, 1, 2
"""Rows of the loss sums of a step; each row has a sum over tokens and the number of tokens.

Row 0 is the cross entropy, row 1 the z-loss, row 2 + i the cross entropy on dataset i.
"""


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step on this rank."""

    sums: Tensor
    """Loss sums ``[2 + datasets, 2]`` of this rank; zeros except on the last pipeline stage."""
    grad_norm: float
    """Gradient norm before clipping; NaN if fp16 overflowed."""
    updated: bool
    """Whether the update was applied; not after an fp16 overflow or a rejected gradient norm."""


def configure_schedules(chunks: list[Any], optimizer: Any, config: Config) -> None:
    """Set the gradient reduction and loss scaling functions that megatron-core's schedules call."""
    core = get_model_config(chunks[0])
    core.finalize_model_grads_func = finalize_model_grads
    core.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        core.no_sync_func = _single_or_list([chunk.no_sync for chunk in chunks])
        core.grad_sync_func = _single_or_list([chunk.start_grad_sync for chunk in chunks])
    if config.parallel.overlap_param_gather:
        core.param_sync_func = _single_or_list([chunk.start_param_sync for chunk in chunks])


def train_step(
    chunks: list[Any],
    optimizer: Any,
    scheduler: Any,
    data: list[BatchIterator],
    config: Config,
    batch_size: int,
    datasets: int = 0,
    should_apply: Callable[[float], bool] = lambda grad_norm: True,
    hold_update: Callable[[], None] = lambda: None,
    beat: Callable[[], None] = no_heartbeat,
) -> StepResult:
    """Run one optimizer step over a global batch.

    Args:
        chunks: model chunks of this rank.
        optimizer: megatron-core's optimizer.
        scheduler: parameter scheduler, stepped by the number of samples.
        data: micro-batch iterator of each chunk.
        config: the run's configuration.
        batch_size: number of samples in this global batch.
        datasets: number of datasets to report losses for.
        should_apply: called with the gradient norm; the update is skipped if it returns false.
        hold_update: called before the update is submitted to the device.
        beat: heartbeat, called after the forward pass of each micro-batch.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = run_micro_batches(chunks, data, config, batch_size, datasets=datasets, beat=beat)
    updated, grad_norm = _clip_and_update(optimizer, should_apply, hold_update)
    if updated:
        scheduler.step(increment=batch_size)
    return StepResult(sums, grad_norm, updated)


def _clip_and_update(
    optimizer: Any,
    should_apply: Callable[[float], bool],
    hold_update: Callable[[], None] = lambda: None,
) -> tuple[bool, float]:
    """Do what megatron-core's ``step`` does, with ``should_apply`` between norm and update.

    The host waits for the device once, for the gradient norm.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    scaled = [part for part in parts if getattr(part, "grad_scaler", None) is not None]
    if scaled:
        _unscale_gradients(scaled)
    else:
        optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    for part in scaled:
        part.grad_scaler.update(not math.isfinite(grad_norm))
    if scaled and not math.isfinite(grad_norm):  # fp16 overflowed; the loss scale is lowered
        return False, math.nan
    if not should_apply(grad_norm):
        return False, grad_norm
    for part in parts:
        if part.config.clip_grad > 0.0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)
    hold_update()
    return bool(optimizer.step_with_ready_grads()), grad_norm


def _unscale_gradients(parts: list[Any]) -> None:
    """Do what megatron-core's ``prepare_grads`` does, without reading whether fp16 overflowed.

    The gradient norm is not finite then: a NaN or Inf that it does not include is in a copy of a
    parameter, whose gradients are equal. That saves a wait for the device and an all-reduce.
    """
    for part in parts:
        if part.is_stub_optimizer:
            continue  # this rank has no parameters
        part._copy_model_grads_to_main_grads()
        torch._amp_foreach_non_finite_check_and_unscale_(
            part._collect_main_grad_data_for_unscaling(),
            part.found_inf,
            part.grad_scaler.inv_scale,
        )


def run_micro_batches(
    chunks: list[Any],
    data: list[BatchIterator],
    config: Config,
    batch_size: int,
    forward_only: bool = False,
    datasets: int = 0,
    beat: Callable[[], None] = no_heartbeat,
) -> Tensor:
    """Run a global batch through the pipeline, with a heartbeat for each micro-batch.

    Returns:
        The loss sums of this rank, ``[2 + datasets, 2]``; zeros except on the last pipeline stage.
    """
    replicas = parallel_state.get_data_parallel_world_size()
    results = get_forward_backward_func()(
        forward_step_func=partial(forward_step, datasets, beat),
        data_iterator=data if len(data) > 1 else data[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=batch_size // (config.training.micro_batch_size * replicas),
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        decoder_seq_length=config.data.seq_length,
        forward_only=forward_only,
    )
    return torch.stack(results).sum(dim=0) if results else zero_sums(datasets)


def forward_step(
    datasets: int, beat: Callable[[], None], data: BatchIterator, model: Any
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run one micro-batch through one model chunk; called by megatron-core's schedules."""
    batch = next(data)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get(DOCUMENT_BOUNDARIES),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    beat()
    return output, partial(masked_loss, batch, datasets)


def masked_loss(batch: Batch, datasets: int, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the losses over the tokens of the loss mask.

    The schedule divides by the numbers of tokens and of micro-batches: each micro-batch has the
    same weight, as in Megatron-LM without per-token loss. Under context parallelism gradients are
    averaged over the parts of a sequence; each is scaled so that all tokens have the same weight.

    Args:
        batch: has ``loss_mask`` ``[b, s]``, 1 for tokens in the loss, ``dataset_id`` ``[b]`` and,
            if s is a part of the sequence, ``LOSS_TOKENS``.
        datasets: number of datasets.
        losses: cross entropy in nats, ``[b, s]``; with the z-loss ``[2, b, s]``.

    Returns:
        The loss sum to minimize; the number of tokens to divide it by; the loss sums
        ``[2 + datasets, 2]``.
    """
    mask = batch["loss_mask"]
    counted = losses.float().view(-1, *mask.shape) * mask
    total = counted.sum()
    tokens = mask.sum()
    with torch.no_grad():
        sums = zero_sums(datasets)
        sums[: len(counted), 0] = counted.sum(dim=(1, 2))
        sums[:FIRST_DATASET_ROW, 1] = tokens
        if datasets:
            per_sample = torch.stack([counted[0].sum(dim=1), mask.sum(dim=1)], dim=1)
            sums[FIRST_DATASET_ROW:].index_add_(0, batch["dataset_id"], per_sample)
    if LOSS_TOKENS in batch:
        parts = parallel_state.get_context_parallel_world_size()
        return total * parts, batch[LOSS_TOKENS].int(), sums
    return total, tokens.int(), sums


def zero_sums(datasets: int = 0) -> Tensor:
    """Return ``[2 + datasets, 2]`` zeros on the current device."""
    return torch.zeros(FIRST_DATASET_ROW + datasets, 2, device=torch.cuda.current_device())


def means_over_ranks(
    sums: Tensor, own: Sequence[float] = ()
) -> tuple[list[float], list[list[float]]]:
    """Return the mean of each row over the tokens of all ranks, and numbers of each rank.

    Synchronizes the host. Tensor-parallel ranks of the last stage hold equal sums, which cancel in
    the quotient.

    Args:
        sums: sums of this rank, ``[rows, 2]``.
        own: numbers of this rank, gathered in the same all-reduce; as many on every rank.

    Returns:
        The mean of each row, NaN for a row without tokens; ``own`` of each rank.
    """
    total = sums.double().flatten()
    if own:
        total = torch.cat([total, _in_slot_of_rank(own, total)])
    dist.all_reduce(total)
    values: list[float] = total.tolist()
    end = len(values) - len(own) * dist.get_world_size()
    means = [a / b if b else math.nan for a, b in zip(values[:end:2], values[1:end:2], strict=True)]
    gathered = [values[i : i + len(own)] for i in range(end, len(values), len(own) or 1)]
    return means, gathered


def _in_slot_of_rank(own: Sequence[float], like: Tensor) -> Tensor:
    """Return ``[ranks * len(own)]`` zeros but for the numbers of this rank, filled by kernels."""
    slots = like.new_zeros(dist.get_world_size() * len(own))
    for i, number in enumerate(own, start=dist.get_rank() * len(own)):
        slots[i].fill_(number)
    return slots


def is_finite_on_all_ranks(sums: Tensor) -> bool:
    """Return whether the losses of a step are finite on all ranks. Synchronizes the host."""
    total = sums[:FIRST_DATASET_ROW, 0].double().sum()
    dist.all_reduce(total)
    return math.isfinite(float(total))


def _single_or_list(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]
