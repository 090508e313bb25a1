"""One optimizer step: forward and backward over all micro-batches, reduce, clip, update.

What the log needs stays on the device: the host waits once per step, where megatron-core's
optimizer reads the gradient norm to clip by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from megatron_llmjp.data.dataloader import Batch
from megatron_llmjp.filesystem import no_heartbeat

BatchIterator = Iterator[Batch]

LM_LOSS, Z_LOSS, DATASETS = 0, 1, 2
"""Rows of the sums that a step gives: a sum of token losses, and the number of its tokens.

Row 0 is the cross entropy, row 1 the z-loss, row 2 + i the cross entropy of dataset number i.
"""


@dataclass(frozen=True)
class StepResult:
    """What one step gave."""

    sums: Tensor
    """``[2 + datasets, 2]`` of this rank; zeros off the last stage."""
    grad_norm: float
    """Before clipping; NaN when fp16 overflowed."""
    updated: bool
    """False when fp16 overflowed, or the gradient norm was judged bad."""


def connect(chunks: list[Any], optimizer: Any, config: Config) -> None:
    """Tell megatron-core's schedules how gradients are reduced and losses scaled."""
    core = get_model_config(chunks[0])
    core.finalize_model_grads_func = finalize_model_grads
    core.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        core.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
        core.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in chunks])
    if config.parallel.overlap_param_gather:
        core.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])


def train_step(
    chunks: list[Any],
    optimizer: Any,
    scheduler: Any,
    data: list[BatchIterator],
    config: Config,
    batch_size: int,
    datasets: int = 0,
    may_take: Callable[[float], bool] = lambda grad_norm: True,
    beat: Callable[[], None] = no_heartbeat,
) -> StepResult:
    """Take one optimizer step over a global batch.

    Args:
        chunks: model chunks of this rank.
        optimizer: megatron-core's.
        scheduler: steps by samples.
        data: micro-batches for each chunk.
        config: the run.
        batch_size: samples of this global batch.
        datasets: number of datasets that losses are told apart by.
        may_take: judges the gradient norm; without its consent nothing is updated.
        beat: called after the forward pass of each micro-batch.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = run_micro_batches(chunks, data, config, batch_size, datasets=datasets, beat=beat)
    updated, grad_norm = _update(optimizer, may_take)
    if updated:
        scheduler.step(increment=batch_size)
    return StepResult(sums, grad_norm, updated)


def _update(optimizer: Any, may_take: Callable[[float], bool]) -> tuple[bool, float]:
    """megatron-core's ``step`` in its parts: it would take an update whatever its norm is."""
    if optimizer.prepare_grads():  # fp16 overflowed, and the loss scale is lowered
        return False, math.nan
    grad_norm = float(optimizer.get_grad_norm())
    if not may_take(grad_norm):
        return False, grad_norm
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.config.clip_grad > 0.0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)
    return bool(optimizer.step_with_ready_grads()), grad_norm


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
        ``[2 + datasets, 2]``, the sums of this rank; zeros off the last pipeline stage.
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
    return torch.stack(results).sum(dim=0) if results else sums_of_none(datasets)


def forward_step(
    datasets: int, beat: Callable[[], None], data: BatchIterator, model: Any
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run one micro-batch through one model chunk, as megatron-core's schedules call it."""
    batch = next(data)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    beat()
    return output, partial(masked_loss, batch, datasets)


def masked_loss(batch: Batch, datasets: int, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses of the tokens that count.

    The schedule divides by the number of tokens and of micro-batches: each micro-batch weighs the
    same, as in Megatron-LM without per-token loss.

    Args:
        batch: with ``loss_mask`` ``[b, s]``, 1 where a token counts, and ``dataset_id`` ``[b]``.
        datasets: number of datasets.
        losses: ``[b, s]``, cross entropy in nats; or ``[2, b, s]`` with the z-loss.

    Returns:
        The sum that is trained on; the number of tokens; ``[2 + datasets, 2]`` for the log.
    """
    mask = batch["loss_mask"]
    counted = losses.float().view(-1, *mask.shape) * mask
    total = counted.sum()
    tokens = mask.sum()
    with torch.no_grad():
        sums = sums_of_none(datasets)
        sums[: len(counted), 0] = counted.sum(dim=(1, 2))
        sums[:DATASETS, 1] = tokens
        if datasets:
            per_sample = torch.stack([counted[0].sum(dim=1), mask.sum(dim=1)], dim=1)
            sums[DATASETS:].index_add_(0, batch["dataset_id"], per_sample)
    return total, tokens.int(), sums


def sums_of_none(datasets: int = 0) -> Tensor:
    """The sums before anything was summed: ``[2 + datasets, 2]`` zeros on this device."""
    return torch.zeros(DATASETS + datasets, 2, device=torch.cuda.current_device())


def means_over_ranks(sums: Tensor) -> list[float]:
    """The mean of each row over the tokens of all ranks, NaN for a row without tokens.

    The host waits here. Tensor-parallel ranks of the last stage hold equal sums, which cancel in
    the quotient.
    """
    total = sums.double()
    dist.all_reduce(total)
    means: list[float] = (total[:, 0] / total[:, 1]).tolist()
    return means


def is_finite_on_all_ranks(sums: Tensor) -> bool:
    """Whether the losses that a step summed are numbers, on every rank; the host waits here."""
    total = sums[:DATASETS, 0].double().sum()
    dist.all_reduce(total)
    return math.isfinite(float(total))


def _one_or_all(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]
