"""Sharding of sequences over a context-parallel group; the attention itself requires GPUs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_llmjp.data import dataloader


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_sequence_and_work(size):
    length = 64
    numbers = torch.arange(length).expand(3, length)
    batch = {"tokens": numbers, "position_ids": numbers, "dataset_id": torch.tensor([5, 6, 7])}
    state = dataloader.parallel_state
    parts = []
    for rank in range(size):
        with (
            mock.patch.object(state, "get_context_parallel_world_size", return_value=size),
            mock.patch.object(state, "get_context_parallel_rank", return_value=rank),
        ):
            parts.append(dataloader.slice_for_context_parallel(dict(batch)))
    together = torch.cat([part["tokens"] for part in parts], dim=1)
    assert torch.equal(together.sort(dim=1).values, numbers)
    chunks = torch.arange(length).view(2 * size, -1)
    for rank, part in enumerate(parts):
        own = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
        assert torch.equal(part["tokens"], own.expand(3, -1))
        assert torch.equal(part["tokens"], part["position_ids"])
        assert torch.equal(part["dataset_id"], batch["dataset_id"])
        # Under a causal mask the number of attended tokens depends on the position.
        pairs = (part["tokens"][0] + 1).sum()
        assert pairs == length * (length + 1) // 2 // size


def test_one_rank_keeps_the_batch():
    batch = {"tokens": torch.zeros(2, 8)}
    with mock.patch.object(
        dataloader.parallel_state, "get_context_parallel_world_size", return_value=1
    ):
        assert dataloader.slice_for_context_parallel(batch) is batch
