"""Validation: the mean loss over the first batches of each named validation set."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataset import ValidationDataset
from megatron_llmjp.runtime.device import Device
from megatron_llmjp.training.feed import feed
from megatron_llmjp.training.step import run_micro_batches


@torch.no_grad()
def evaluate(
    chunks: list[Any], datasets: dict[str, ValidationDataset], config: Config, device: Device
) -> dict[str, float]:
    """Mean cross entropy in nats per token of each validation set; all ranks call it."""
    for chunk in chunks:
        chunk.eval()
    batches = config.training.eval_iters
    losses = {}
    for name, dataset in datasets.items():
        end = batches * config.training.global_batch_size
        data = feed(dataset, config, device, 0, end)
        total = torch.zeros(2, device=device.torch)
        for _ in range(batches):
            total += run_micro_batches(chunks, data, config, forward_only=True)
        losses[name] = mean_loss(total)
    for chunk in chunks:
        chunk.train()
    return losses


def mean_loss(total: torch.Tensor) -> float:
    """The mean over all ranks of ``[2]`` sums of losses and tokens.

    Tensor-parallel ranks of the last stage hold equal sums, which cancel in the quotient.
    """
    total = total.double() if not total.is_cuda else total
    dist.all_reduce(total)
    return (total[0] / total[1]).item()
