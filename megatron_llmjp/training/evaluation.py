"""Validation: the mean loss over the first batches of each named validation set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataset import ValidationDataset
from megatron_llmjp.filesystem import no_heartbeat
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.batch_iterator import batch_iterators
from megatron_llmjp.training.train_step import (
    LM_LOSS_ROW,
    means_over_ranks,
    run_micro_batches,
    zero_sums,
)


@torch.no_grad()
def evaluate(
    chunks: list[Any],
    datasets: dict[str, ValidationDataset],
    config: Config,
    device: Device,
    should_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[], None] = no_heartbeat,
) -> dict[str, float]:
    """Return the mean cross entropy (nats per token) of each validation set; all ranks call it.

    Each validation reads a set from its beginning: ``eval_iters`` global batches, or as many full
    ones as it has, but at least one; a set smaller than one batch is repeated to fill it.

    Args:
        chunks: model chunks of this rank.
        datasets: validation sets by name.
        config: the run's configuration.
        device: the device of this rank.
        should_stop: called before each batch; must return the same on all ranks. Once it is true,
            sets that are not finished are omitted.
        beat: heartbeat, called after each micro-batch and each batch.
    """
    for chunk in chunks:
        chunk.eval()
    size = config.training.global_batch_size
    losses = {}
    for name, dataset in datasets.items():
        batches = min(config.training.eval_iters, max(1, len(dataset) // size))
        data = batch_iterators(dataset, config, device, 0, batches * size, lambda _: size)
        sums = zero_sums()
        for _ in range(batches):
            if should_stop():
                break
            sums += run_micro_batches(chunks, data, config, size, forward_only=True, beat=beat)
            beat()
        else:
            losses[name] = means_over_ranks(sums)[0][LM_LOSS_ROW]
    for chunk in chunks:
        chunk.train()
    return losses
