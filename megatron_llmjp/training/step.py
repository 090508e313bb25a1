"""One optimizer step: forward and backward over all micro-batches, reduce, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.loader import Batch
from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

BatchIterator = Iterator[Batch]


@dataclass(frozen=True)
class StepResult:
    """What one step gave."""

    loss: Tensor
    """``[2]``: sum of token losses and number of tokens on this rank; zeros off the last stage."""
    grad_norm: float
    """Before clipping."""
    updated: bool
    """False when fp16 overflowed and the step was skipped."""


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
    chunks: list[Any], optimizer: Any, scheduler: Any, data: list[BatchIterator], config: Config
) -> StepResult:
    """Take one optimizer step over a global batch."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = run_micro_batches(chunks, data, config, forward_only=False)
    updated, grad_norm, _ = optimizer.step()
    if updated:
        scheduler.step(increment=config.training.global_batch_size)
    return StepResult(losses, float(grad_norm or 0.0), bool(updated))


def run_micro_batches(
    chunks: list[Any], data: list[BatchIterator], config: Config, forward_only: bool
) -> Tensor:
    """Run a global batch through the pipeline.

    Returns:
        ``[2]``: sum of token losses and number of tokens seen by this rank, zeros off the last
        pipeline stage.
    """
    replicas = parallel_state.get_data_parallel_world_size()
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data if len(data) > 1 else data[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=config.training.global_batch_size
        // (config.training.micro_batch_size * replicas),
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        decoder_seq_length=config.data.seq_length,
        forward_only=forward_only,
    )
    if not results:
        return torch.zeros(2, device=torch.cuda.current_device())
    return torch.stack(results).sum(dim=0)


def forward_step(data: BatchIterator, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run one micro-batch through one model chunk, as megatron-core's schedules call it."""
    batch = next(data)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(masked_loss, batch["loss_mask"])


def masked_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses of the tokens that count.

    The schedule divides by the number of tokens and of micro-batches: each micro-batch weighs the
    same, as in Megatron-LM without per-token loss.

    Args:
        mask: ``[b, s]``, 1 where a token counts.
        losses: ``[b, s]``, cross entropy in nats.

    Returns:
        The sum; the number of tokens; ``[2]`` with both, for the log.
    """
    total = (losses.float() * mask).sum()
    tokens = mask.sum()
    return total, tokens.int(), torch.stack([total.detach(), tokens])


def _one_or_all(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]
