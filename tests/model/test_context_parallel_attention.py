"""Attention of the parts of sequences, rank by rank, against attention over whole sequences.

Runs over process groups are in ``tests/distributed/test_layouts.py``. The kernel for documents
exists for GPUs only: attention within each document, computed by torch, takes its place.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_llmjp.data.documents import DOCUMENT_BOUNDARIES, DOCUMENT_STARTS, collate
from megatron_llmjp.model import context_parallel_attention as module
from megatron_llmjp.model.attention import SDPAttention, dense_mask
from tests.support.tolerances import ELEMENTWISE, assert_close

SAMPLES, LENGTH, HEADS, GROUPS, SIZE = 2, 48, 4, 2, 8
STARTS = ([0, 1, 20, 21, 47], [0, 12, 24])
"""Starts of the documents of each sample: within, at the ends of, and across the chunks."""


def documents():
    tokens = torch.zeros(LENGTH, dtype=torch.int64)
    rows = [{"tokens": tokens, DOCUMENT_STARTS: torch.tensor(s).int()} for s in STARTS]
    return collate(rows)[DOCUMENT_BOUNDARIES]


def attention(cls):
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS)
    config.attention_dropout = 0.0
    return cls(config, 1, None, "self")


def by_documents(query, key, value, query_boundaries, key_boundaries, scale=None):
    """Return what flash attention's kernel for varied lengths returns: aligned to the last key."""
    flat = [x.transpose(0, 1).flatten(0, 1).transpose(0, 1) for x in (query, key, value)]
    outputs = [torch.zeros_like(flat[0])]
    pairs = [itertools.pairwise(x.tolist()) for x in (query_boundaries, key_boundaries)]
    for (first, end), (first_key, end_key) in zip(*pairs, strict=True):
        if first == end:
            continue
        seen = torch.ones(end - first, end_key - first_key, dtype=torch.bool)
        found = F.scaled_dot_product_attention(
            flat[0][:, first:end], flat[1][:, first_key:end_key], flat[2][:, first_key:end_key],
            attn_mask=seen.tril_(end_key - first_key - (end - first)), scale=scale,
            enable_gqa=True,
        )  # fmt: skip
        outputs.append(F.pad(found, (0, 0, first, flat[0].shape[1] - end)))
    packed = torch.stack(outputs).sum(0).transpose(0, 1)
    return packed.unflatten(0, (query.shape[1], -1)).transpose(0, 1).flatten(2)


@pytest.mark.parametrize("kind", ["causal", "dense mask", "kernel"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_parts_are_those_of_the_whole(monkeypatch, ranks, kind):
    monkeypatch.setattr(module, "document_attention", by_documents)
    generator = torch.Generator().manual_seed(ranks)
    whole = [
        torch.randn(LENGTH, SAMPLES, heads, SIZE, generator=generator, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    dense = dense_mask(documents(), SAMPLES, LENGTH, torch.float32)
    expected = attention(SDPAttention)(*whole, None if kind == "causal" else dense)
    weights = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad((expected * weights).sum(), whole)

    def part_of(tensor, rank):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
        rows = {"x": tensor.transpose(0, 1)}
        return get_batch_on_this_cp_rank(rows, cp_group=group)["x"].transpose(0, 1)

    total = torch.zeros(())
    monkeypatch.setattr("megatron.core.utils.get_pg_size", lambda group: group.size())
    monkeypatch.setattr("megatron.core.utils.get_pg_rank", lambda group: group.rank())
    for rank in range(ranks):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        monkeypatch.setattr(
            module.parallel_state, "get_context_parallel_group", lambda group=group: group
        )
        gathered = torch.cat([torch.cat([part_of(x, r) for x in whole[1:]], -1)
                              for r in range(ranks)])  # fmt: skip
        monkeypatch.setattr(
            module, "gather_from_sequence_parallel_region", lambda *_, g=gathered, **__: g
        )
        mask = {"causal": None, "dense mask": dense, "kernel": documents()}[kind]
        parts = [part_of(x, rank) for x in whole]
        found = attention(module.ContextParallelAttention)(*parts, mask)
        assert_close(found.detach(), part_of(expected, rank).detach(), ELEMENTWISE, f"rank {rank}")
        total = total + (found * part_of(weights, rank)).sum()
    for found, value in zip(torch.autograd.grad(total, whole), gradients, strict=True):
        assert_close(found, value, ELEMENTWISE, "gradient")


def test_boundaries_of_parts():
    """Every document has the tokens that it has in the range, in the same order."""
    boundaries, numbers = documents(), torch.arange(SAMPLES * LENGTH).view(SAMPLES, LENGTH)
    for start, end in ((0, 48), (12, 24), (36, 48), (0, 24), (19, 22)):
        found = module.boundaries_within(boundaries, LENGTH, start, end)
        assert found.dtype == torch.int32
        kept = numbers[:, start:end].flatten()
        for i, (first, last) in enumerate(itertools.pairwise(boundaries)):
            expected = kept[(kept >= first) & (kept < last)]
            assert torch.equal(kept[found[i] : found[i + 1]], expected)
