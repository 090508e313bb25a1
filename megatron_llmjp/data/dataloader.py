"""Data loader: micro-batches of a data-parallel rank, starting at ``consumed_samples``.

A global batch is the same range of samples in every parallel layout. Its micro-batch ``k``, counted
without data parallelism, goes to data-parallel rank ``k mod d``, as in Megatron-LM.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataset import Sample
from megatron_llmjp.data.documents import DOCUMENT_BOUNDARIES, collate
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.parallel.signals import STOP_SIGNALS

Batch = dict[str, torch.Tensor]

BatchSizeFunction = Callable[[int], int]
"""Maps consumed samples to the size of the next global batch."""

LOSS_TOKENS = "loss_tokens"
"""Key of a batch under context parallelism: tokens in the loss of the whole sequences, ``[]``."""

_INTEGERS = ("tokens", "labels", "loss_mask", "position_ids")


def global_batches(first: int, end: int, batch_size: BatchSizeFunction) -> Iterator[range]:
    """Yield the sample numbers of each full global batch in ``[first, end)``."""
    while first < end and first + batch_size(first) <= end:
        batch = range(first, first + batch_size(first))
        yield batch
        first = batch.stop


class MicroBatchSampler(Sampler[list[int]]):
    """Batch sampler of one data-parallel rank: micro-batches of samples ``[first, end)``.

    ``batch_size`` divides the range into global batches; without it the range is one batch.
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
    boundaries_only: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of samples ``[first, end)``, on its device.

    The first rank of each tensor-parallel group reads them and broadcasts them to the others. If
    attention is restricted to documents, all of them read: the number of documents is the shape of
    a tensor, which a rank would otherwise have to wait for.

    Args:
        dataset: the samples.
        config: the run's configuration.
        device: the device of this rank.
        first: first sample.
        end: end of the samples.
        batch_size: maps consumed samples to the size of the next global batch.
        boundaries_only: yield the boundaries of the documents only.
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
    if config.data.reset_attention_mask or parallel_state.get_tensor_model_parallel_rank() == 0:
        loader = iter(_data_loader(dataset, sampler, config, device, boundaries_only))
    for _ in sampler:
        batch = next(loader) if loader is not None else None
        yield slice_for_context_parallel(_on_device(batch, config, device))


def _data_loader(
    dataset: Dataset[Sample],
    sampler: MicroBatchSampler,
    config: Config,
    device: Device,
    boundaries_only: bool,
) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.data.num_workers,
        # Python 3.14's default would pickle the dataset with its open files.
        multiprocessing_context="fork" if config.data.num_workers else None,
        collate_fn=partial(collate, boundaries_only=boundaries_only),
        # Without its own generator the loader draws a seed from torch's default generator, which
        # dropout uses on CPUs: the dropout masks of tensor-parallel ranks would then differ.
        generator=torch.Generator(),
        worker_init_fn=_initialize_worker,
        pin_memory=device.is_cuda,
    )


def _initialize_worker(worker: int) -> None:
    """Ignore stop signals in a data worker, and collect its garbage automatically.

    The launcher, Slurm or a terminal signals all processes, but the rank needs its workers until it
    has saved a checkpoint. Workers exit with their rank. The rank itself may have disabled the
    automatic collection (``training/garbage_collection.py``).
    """
    gc.enable()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def slice_for_context_parallel(batch: Batch) -> Batch:
    """Return this context-parallel rank's part of each sequence: chunks r and 2c - 1 - r of 2c.

    r is the rank and c the context-parallel size. This balances the attention computation under
    the causal mask (megatron/core/utils.py, ``get_batch_on_this_cp_rank``). Without context
    parallelism the batch is returned unchanged.

    :data:`LOSS_TOKENS` is added to batches with a loss mask.
    """
    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    whole = {LOSS_TOKENS: batch["loss_mask"].sum()} if "loss_mask" in batch else {}
    sequences = {name: tensor for name, tensor in batch.items() if tensor.dim() > 1}
    return {**batch, **whole, **get_batch_on_this_cp_rank(sequences)}


def _on_device(batch: Batch | None, config: Config, device: Device) -> Batch:
    """Copy a batch of the loader to the device; without one, receive it from another rank."""
    if batch is None or DOCUMENT_BOUNDARIES not in batch:
        return _integers_on_device(batch, config, device)
    boundaries = batch.pop(DOCUMENT_BOUNDARIES).to(device.torch, non_blocking=True)
    integers = _integers_on_device(batch, config, device) if batch else {}
    return {**integers, DOCUMENT_BOUNDARIES: boundaries}


def _integers_on_device(batch: Batch | None, config: Config, device: Device) -> Batch:
    """Copy everything but the boundaries; broadcast it unless all tensor-parallel ranks read."""
    shape = (config.training.micro_batch_size, config.data.seq_length)
    packed = torch.zeros(
        len(_INTEGERS) * shape[0] * shape[1] + shape[0], dtype=torch.int64, device=device.torch
    )
    rows = packed[: -shape[0]].view(len(_INTEGERS), *shape)
    dataset_id = packed[-shape[0] :]
    if batch is not None:
        for row, name in zip(rows, _INTEGERS, strict=True):
            # The loss mask is converted on the device: a conversion on the host would copy it to
            # pageable memory, from which the host copies synchronously.
            row.copy_(batch[name].to(row.device, non_blocking=True))
        if "dataset_id" in batch:
            dataset_id.copy_(batch["dataset_id"], non_blocking=True)
    every_rank_reads = config.data.reset_attention_mask
    if not every_rank_reads and parallel_state.get_tensor_model_parallel_world_size() > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        dist.broadcast(packed, source, parallel_state.get_tensor_model_parallel_group())
    shared = {**dict(zip(_INTEGERS, rows, strict=True)), "dataset_id": dataset_id}
    shared["loss_mask"] = shared["loss_mask"].float()
    return shared
