"""``consumed_samples`` -> the next micro-batches of this data-parallel rank.

Global batch n is samples ``[n * global_batch_size, (n + 1) * global_batch_size)`` of the schedule
in every layout: micro-batch k of a run without data parallelism goes to rank ``k mod d``, as in
Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.dataset import Sample
from megatron_llmjp.runtime.device import Device, without_warnings

with without_warnings():
    from megatron.core import parallel_state

Batch = dict[str, torch.Tensor]

_INTEGERS = ("tokens", "labels", "loss_mask", "position_ids")


class MicroBatches(Sampler[list[int]]):
    """Sample numbers of this data-parallel rank's micro-batches."""

    def __init__(self, first: int, end: int, micro_batch_size: int, rank: int, ranks: int) -> None:
        self._range = (first, end)
        self._size = micro_batch_size
        self._rank = rank
        self._ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        first, end = self._range
        step = self._size * self._ranks
        for start in range(first + self._rank * self._size, end - self._size + 1, step):
            yield list(range(start, start + self._size))


def micro_batches(
    dataset: Dataset[Sample], config: Config, device: Device, first: int, end: int
) -> Iterator[Batch]:
    """Micro-batches of samples ``[first, end)`` on this rank's device.

    The first rank of a tensor-parallel group reads; the others receive the same tensors.
    """
    loader: Iterator[Batch] | None = None
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        sampler = MicroBatches(
            first,
            end,
            config.training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        loader = iter(
            DataLoader(
                dataset,
                batch_sampler=sampler,
                num_workers=config.data.num_workers,
                collate_fn=default_collate,
                # Else it draws a seed from the generator of dropout, which on a CPU is torch's
                # own, and the ranks of a tensor-parallel group no longer drop the same units.
                generator=torch.Generator(),
                pin_memory=device.is_cuda,
            )
        )
    size = config.training.global_batch_size // parallel_state.get_data_parallel_world_size()
    per_batch = size // config.training.micro_batch_size
    for _ in range((end - first) // config.training.global_batch_size * per_batch):
        yield _share(next(loader) if loader is not None else None, config, device)


def _share(batch: Batch | None, config: Config, device: Device) -> Batch:
    """Give a batch to all ranks of the tensor-parallel group, in one or two broadcasts."""
    shape = (config.training.micro_batch_size, config.data.seq_length)
    packed = torch.empty((len(_INTEGERS), *shape), dtype=torch.int64, device=device.torch)
    mask = None
    if config.data.reset_attention_mask:
        mask_shape = (shape[0], 1, shape[1], shape[1])
        mask = torch.empty(mask_shape, dtype=torch.bool, device=device.torch)
    if batch is not None:
        for row, name in zip(packed, _INTEGERS, strict=True):
            row.copy_(batch[name], non_blocking=True)
        if mask is not None:
            mask.copy_(batch["attention_mask"], non_blocking=True)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        dist.broadcast(packed, source, group)
        if mask is not None:
            dist.broadcast(mask, source, group)
    shared = dict(zip(_INTEGERS, packed, strict=True))
    shared["loss_mask"] = shared["loss_mask"].float()
    return shared if mask is None else {**shared, "attention_mask": mask}
