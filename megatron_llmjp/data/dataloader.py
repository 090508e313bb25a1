"""``consumed_samples`` -> the next micro-batches of this data-parallel rank.

A global batch is the next so many samples of the schedule in every layout: micro-batch k of a run
without data parallelism goes to rank ``k mod d``, as in Megatron-LM.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataset import Sample
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.parallel.signals import STOP_SIGNALS

Batch = dict[str, torch.Tensor]

BatchSizeFunction = Callable[[int], int]
"""Samples consumed -> size of the global batch that follows."""

_INTEGERS = ("tokens", "labels", "loss_mask", "position_ids")


def global_batches(first: int, end: int, batch_size: BatchSizeFunction) -> Iterator[range]:
    """Sample numbers of each full global batch of samples ``[first, end)``."""
    while first < end and first + batch_size(first) <= end:
        batch = range(first, first + batch_size(first))
        yield batch
        first = batch.stop


class MicroBatchSampler(Sampler[list[int]]):
    """Sample numbers of this data-parallel rank's micro-batches of samples ``[first, end)``.

    They are cut into global batches by ``batch_size``; without it they are one.
    """

    def __init__(
        self,
        first: int,
        end: int,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        batch_size: BatchSizeFunction | None = None,
    ) -> None:
        self._batches = (first, end, batch_size or (lambda _: end - first))
        self._micro = micro_batch_size
        self._rank = rank
        self._ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in global_batches(*self._batches):
            for start in batch[self._rank * self._micro :: self._ranks * self._micro]:
                yield list(range(start, start + self._micro))


def micro_batches(
    dataset: Dataset[Sample],
    config: Config,
    device: Device,
    first: int,
    end: int,
    batch_size: BatchSizeFunction,
) -> Iterator[Batch]:
    """Micro-batches of samples ``[first, end)`` on this rank's device.

    The first rank of a tensor-parallel group reads; the others receive the same tensors.
    """
    sampler = MicroBatchSampler(
        first,
        end,
        config.training.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        batch_size,
    )
    loader: Iterator[Batch] | None = None
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        loader = iter(
            DataLoader(
                dataset,
                batch_sampler=sampler,
                num_workers=config.data.num_workers,
                # Python 3.14's own choice would pickle all that is open in a dataset.
                multiprocessing_context="fork" if config.data.num_workers else None,
                collate_fn=default_collate,
                # Else it draws a seed from the generator of dropout, which on a CPU is torch's
                # own, and the ranks of a tensor-parallel group no longer drop the same units.
                generator=torch.Generator(),
                worker_init_fn=_ignore_requests_to_stop,
                pin_memory=device.is_cuda,
            )
        )
    for _ in sampler:
        batch = _share(next(loader) if loader is not None else None, config, device)
        yield slice_for_context_parallel(batch)


def _ignore_requests_to_stop(worker: int) -> None:
    """In a worker: the launcher, Slurm or a terminal asks all processes, but the rank decides.

    It needs its workers until it has saved; they end with it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def slice_for_context_parallel(batch: Batch) -> Batch:
    """This rank's part of each sequence: chunks r and 2c - 1 - r of 2c, for rank r of c.

    So every rank has as many pairs of tokens to attend to under the causal mask
    (megatron/core/utils.py, ``get_batch_on_this_cp_rank``). Without context parallelism it is the
    batch itself.
    """
    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    sequences = {name: tensor for name, tensor in batch.items() if tensor.dim() > 1}
    return {**batch, **get_batch_on_this_cp_rank(sequences)}


def _share(batch: Batch | None, config: Config, device: Device) -> Batch:
    """Give a batch to all ranks of the tensor-parallel group, in one or two broadcasts."""
    shape = (config.training.micro_batch_size, config.data.seq_length)
    packed = torch.zeros(
        len(_INTEGERS) * shape[0] * shape[1] + shape[0], dtype=torch.int64, device=device.torch
    )
    rows = packed[: -shape[0]].view(len(_INTEGERS), *shape)
    dataset_id = packed[-shape[0] :]
    mask = None
    if config.data.reset_attention_mask:
        mask_shape = (shape[0], 1, shape[1], shape[1])
        mask = torch.empty(mask_shape, dtype=torch.bool, device=device.torch)
    if batch is not None:
        for row, name in zip(rows, _INTEGERS, strict=True):
            row.copy_(batch[name], non_blocking=True)
        if "dataset_id" in batch:
            dataset_id.copy_(batch["dataset_id"], non_blocking=True)
        if mask is not None:
            mask.copy_(batch["attention_mask"], non_blocking=True)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        dist.broadcast(packed, source, group)
        if mask is not None:
            dist.broadcast(mask, source, group)
    shared = {**dict(zip(_INTEGERS, rows, strict=True)), "dataset_id": dataset_id}
    shared["loss_mask"] = shared["loss_mask"].float()
    return shared if mask is None else {**shared, "attention_mask": mask}
