"""Validation: the mean loss over the first batches of each named validation set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataset import ValidationDataset
from megatron_llmjp.filesystem import no_heartbeat
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.batch_iterator import feed
from megatron_llmjp.training.train_step import (
    LM_LOSS,
    means_over_ranks,
    run_micro_batches,
    sums_of_none,
)


@torch.no_grad()
def evaluate(
    chunks: list[Any],
    datasets: dict[str, ValidationDataset],
    config: Config,
    device: Device,
    is_over: Callable[[], bool] = lambda: False,
    beat: Callable[[], None] = no_heartbeat,
) -> dict[str, float]:
    """Mean cross entropy in nats per token of each validation set; all ranks call it.

    A set is read from its beginning each time: ``eval_iters`` global batches, or as many full ones
    as it holds, but at least one. A set smaller than one batch is repeated to fill it. When
    ``is_over`` says so, on all ranks at once, the sets that are not finished are omitted. ``beat``
    is called after each micro-batch and batch.
    """
    for chunk in chunks:
        chunk.eval()
    size = config.training.global_batch_size
    losses = {}
    for name, dataset in datasets.items():
        batches = min(config.training.eval_iters, max(1, len(dataset) // size))
        data = feed(dataset, config, device, 0, batches * size, lambda _: size)
        sums = sums_of_none()
        for _ in range(batches):
            if is_over():
                break
            sums += run_micro_batches(chunks, data, config, size, forward_only=True, beat=beat)
            beat()
        else:
            losses[name] = means_over_ranks(sums)[LM_LOSS]
    for chunk in chunks:
        chunk.train()
    return losses


def perplexity(loss: float) -> float:
    """e^loss; as in Megatron-LM no loss counts as more than 20. NaN for a NaN."""
    return math.exp(min(loss, 20.0))


def describe(losses: dict[str, float], iteration: int) -> str:
    """The line that shows validation losses."""
    parts = [
        f"{name} loss: {loss:.6E} | {name} PPL: {perplexity(loss):.6E}"
        for name, loss in losses.items()
    ]
    return f" validation at iteration {iteration} | {' | '.join(parts)} |"
