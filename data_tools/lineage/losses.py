"""Losses of the tokens of a batch under a checkpoint of the run, in one process.

The model is built without parallelism, on a GPU if there is one, and applied to the samples as in
training. On a CPU it computes in fp32, whatever the precision of the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from data_tools.run_history import RecordedRun
from megatron_llmjp.checkpoint import sharded_state
from megatron_llmjp.checkpoint.sharded_state import RunState
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataset import FoldDataset, Sample
from megatron_llmjp.data.documents import DOCUMENT_BOUNDARIES
from megatron_llmjp.data.folds.schedule import NO_SKIPPED_SAMPLES
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.inference.single_process import single_process_groups
from megatron_llmjp.model.gpt import build_model
from megatron_llmjp.parallel import device as devices
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.batch_iterator import batch_iterators
from megatron_llmjp.training.optimizer import wrap_half_precision

SINGLE_PROCESS: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "micro_batch_size": 1,
    "rampup_batch_size": None,
    "num_workers": 0,
}
"""Fields of the configuration of a run that is evaluated in one process, sample by sample."""


@dataclass(frozen=True)
class SampleLosses:
    """Losses of one sample of s tokens.

    Attributes:
        labels: the predicted tokens, ``[s]``.
        losses: cross entropy of each in nats, ``[s]``.
        mask: whether each is part of the training loss, ``[s]``.
    """

    labels: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    mask: npt.NDArray[np.bool_]


class _AtPositions(Dataset[Sample]):
    """The samples at positions of a schedule, in this order; skipped positions count."""

    def __init__(self, data: FoldDataset, positions: Sequence[int]) -> None:
        self._data, self._positions = data, positions

    def __getitem__(self, index: int) -> Sample:
        return self._data[self._positions[index]]


def compute_losses(
    run: RecordedRun, epochs: EpochDatasets, folder: Path, positions: Sequence[int]
) -> list[SampleLosses]:
    """Return the losses of samples under a checkpoint.

    Args:
        run: the run.
        epochs: opens its datasets.
        folder: the checkpoint, which may be another one than that of ``run``.
        positions: positions of the samples in the schedule.
    """
    warnings.simplefilter("ignore")  # deprecations inside libraries
    device = devices.setup()
    config = single_process_config(run.config, len(positions), device)
    with single_process_groups(config, device):
        chunks = wrap_half_precision(build_model(config, device), config)
        sharded_state.load_checkpoint(folder, RunState(chunks))
        data = FoldDataset(run.schedule.with_skips(NO_SKIPPED_SAMPLES), epochs)
        return _evaluate(chunks, _AtPositions(data, positions), len(positions), config, device)


def single_process_config(config: Config, samples: int, device: Device) -> Config:
    """Return a run's configuration for the evaluation of a batch in one process.

    The padded vocabulary size of the run is kept.
    """
    padded = config.padded_vocab_size
    fields = {**SINGLE_PROCESS, "padded_vocab_size": padded, "global_batch_size": samples}
    if not device.is_cuda:
        fields |= {"bf16": False, "fp16": False}
    return replace_fields(config, **fields)


@torch.no_grad()
def _evaluate(
    chunks: list[Any], data: Dataset[Sample], samples: int, config: Config, device: Device
) -> list[SampleLosses]:
    (model,) = chunks
    model.eval()
    (batches,) = batch_iterators(data, config, device, 0, samples, lambda _: samples)
    found = []
    for batch in batches:
        losses = model(
            batch["tokens"],
            batch["position_ids"],
            batch.get(DOCUMENT_BOUNDARIES),
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        mask = batch["loss_mask"]
        entropy = losses.float().view(-1, *mask.shape)[0, 0]  # without the z-loss
        found.append(
            SampleLosses(
                batch["labels"][0].cpu().numpy(),
                entropy.double().cpu().numpy(),
                mask[0].cpu().numpy() > 0,
            )
        )
    return found
