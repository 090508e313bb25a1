"""Core attention under context parallelism, without Transformer Engine.

Rank r of c holds the chunks r and 2c - 1 - r of 2c of each sequence
(:func:`~megatron_llmjp.data.dataloader.slice_for_context_parallel`), which gives all ranks the
same work under the causal mask. Each rank gathers the keys and values of all ranks, and computes
the attention of its two chunks of queries over the keys up to the end of the chunk. In the
backward pass the gradients of keys and values are reduced and scattered (Llama Team 2024, "The
Llama 3 Herd of Models", section 3.3.2: all-gather based context parallelism).

The gathered keys and values are kept for the backward pass, unless the core attention is
recomputed (``recompute_granularity: selective``).
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_llmjp.model.attention import SDPAttention, document_attention, has_document_kernel


class ContextParallelAttention(SDPAttention):
    """Core attention whose queries, keys and values are split along the sequence."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **_: object,
    ) -> Tensor:
        """Compute causal attention.

        Args:
            query: ``[s/c, b, n/t, d]``, this rank's chunks of the sequence.
            key: ``[s/c, b, g/t, d]``, g query groups.
            value: same shape as ``key``.
            attention_mask: None; or of the whole sequences: the boundaries of the documents, an
                int32 tensor (``data/documents.py``), or
                :func:`~megatron_llmjp.model.attention.dense_mask` of them.

        Returns:
            ``[s/c, b, n*d/t]``.
        """
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        gathered = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=group)
        keys, values = in_sequence_order(gathered, size).split(key.shape[-1], dim=-1)
        outputs = []
        for queries, chunk in zip(query.chunk(2), (rank, 2 * size - 1 - rank), strict=True):
            start = chunk * len(queries)
            end = start + len(queries)
            outputs.append(
                self._attend(queries, keys[:end], values[:end], attention_mask, start, len(keys))
            )
        return torch.cat(outputs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        start: int,
        length: int,
    ) -> Tensor:
        """Attend from the positions from ``start`` on to all positions up to the last of them."""
        end = len(key)
        if mask is not None and mask.dtype != torch.int32:
            return self.attend_with_mask(query, key, value, mask[:, :, start:end, :end])
        if mask is None:
            if not (query.is_cuda and has_document_kernel(self.config, query.dtype)):
                seen = torch.ones(len(query), end, dtype=torch.bool, device=query.device)
                return self.attend_with_mask(query, key, value, seen.tril_(start))
            # SDPA's causal mask begins with the first key; that of this kernel ends with the last.
            mask = torch.arange(query.shape[1] + 1, dtype=torch.int32, device=query.device) * length
        queries = boundaries_within(mask, length, start, end)
        keys = boundaries_within(mask, length, 0, end)
        return document_attention(query, key, value, queries, keys, self.softmax_scale)


def in_sequence_order(gathered: Tensor, ranks: int) -> Tensor:
    """Return the chunks of all ranks in the order of the sequence.

    Args:
        gathered: ``[s, ...]``, the two chunks of rank 0, those of rank 1, ...
        ranks: number of ranks.
    """
    chunks = gathered.unflatten(0, (ranks, 2, -1))
    return torch.cat([chunks[:, 0].flatten(0, 1), chunks[:, 1].flip(0).flatten(0, 1)])


def boundaries_within(boundaries: Tensor, length: int, start: int, end: int) -> Tensor:
    """Return the boundaries of documents among the tokens ``[start, end)`` of each sample.

    Documents without such tokens become empty; their number does not change.

    Args:
        boundaries: among the tokens ``[b * s]`` of whole samples (``data/documents.py``).
        length: number s of tokens of a sample.
        start: first token of each sample that counts.
        end: end of these tokens.
    """
    samples = boundaries.div(length, rounding_mode="floor")
    within = (boundaries - samples * length - start).clamp(0, end - start)
    return (samples * (end - start) + within).int()
