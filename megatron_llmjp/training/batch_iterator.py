"""Batch iterators of the model chunks of this rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils.data import Dataset

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataloader import Batch, BatchSizeFunction, micro_batches
from megatron_llmjp.data.dataset import FoldDataset, Sample
from megatron_llmjp.data.folds.schedule import Schedule
from megatron_llmjp.parallel.device import Device


class SamplesWithDatasetId(Dataset[Sample]):
    """Training samples with an added ``dataset_id``, the index into :func:`dataset_names`."""

    def __init__(self, data: FoldDataset) -> None:
        self._data = data
        self._numbers = {name: i for i, name in enumerate(dataset_names(data.schedule))}

    def __getitem__(self, index: int) -> Sample:
        piece, _ = self._data.locate(index)
        return {**self._data[index], "dataset_id": torch.tensor(self._numbers[piece.name])}


def dataset_names(schedule: Schedule) -> list[str]:
    """Return the names of the run's datasets, in order of first use."""
    names = (piece.name for fold in schedule.folds for piece in fold.slices)
    return list(dict.fromkeys(names))


class _PartialBatch(dict[str, Any]):
    """Batch of a middle pipeline stage, which needs no tokens: missing keys give None."""

    def __missing__(self, key: str) -> None:
        return None


def batch_iterators(
    dataset: Dataset[Sample],
    config: Config,
    device: Device,
    first: int,
    end: int,
    batch_size: BatchSizeFunction,
) -> list[Iterator[Batch]]:
    """Return one iterator per model chunk over the micro-batches of samples ``[first, end)``.

    Only chunks that need tokens or labels load them. The others get empty batches, or the
    boundaries of the documents if attention is restricted to them.
    """
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    iterators: list[Iterator[Batch]] = []
    for vp_stage in range(chunks) if chunks else [None]:
        needs_tokens = _needs_tokens(vp_stage)
        if needs_tokens or config.data.reset_attention_mask:
            batches = micro_batches(
                dataset, config, device, first, end, batch_size, boundaries_only=not needs_tokens
            )
            iterators.append(batches if needs_tokens else map(_PartialBatch, batches))
        else:
            iterators.append(itertools.repeat(_PartialBatch()))
    return iterators


def _needs_tokens(vp_stage: int | None) -> bool:
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    return bool(
        parallel_state.is_pipeline_first_stage(**stage)
        or parallel_state.is_pipeline_last_stage(**stage)
    )
