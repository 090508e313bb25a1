"""Core attention by torch's fused kernels, causal or restricted to documents.

No kernel used here holds the ``s x s`` scores. On a GPU these are, in the order of preference:

- without documents: flash attention or cuDNN's, which support grouped queries; for fp32, or a GPU
  without them, the memory-efficient kernel on expanded keys and values;
- with documents: flash attention over sequences of different lengths, which skips the scores
  between documents;
- with documents, and fp32, attention dropout, or a head size that flash attention does not
  support: the memory-efficient kernel with a dense mask, which all layers share.

torch's math kernel, which holds the scores, is disabled on GPUs. On a CPU torch chooses the kernel;
documents are a dense mask there. FlexAttention has no dropout either, and has to be compiled.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF_PRECISION = (torch.float16, torch.bfloat16)
_FUSED_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]
_FLASH_CAPABILITY = (8, 0)
"""Oldest compute capability that flash attention supports: Ampere's."""
_FLASH_HEAD_SIZE = 256
"""Largest size of a head that flash attention supports."""


class SDPAttention(MegatronModule):
    """Core attention with torch's fused kernels."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **_: Any,
    ) -> Tensor:
        """Compute causal attention.

        Args:
            query: ``[s, b, n/t, d]``, the n heads split over t tensor parallel ranks; with a
                key/value cache, s is 1: the last token.
            key: ``[s, b, g/t, d]``, g query groups; with a cache, all tokens until now.
            value: same shape as ``key``.
            attention_mask: None; or the boundaries of the documents, an int32 tensor
                (``data/documents.py``); or what to add to the scores, such as
                :func:`dense_mask` of them.

        Returns:
            ``[s, b, n*d/t]``.
        """
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            boundaries = attention_mask
            return document_attention(query, key, value, boundaries, boundaries, self.softmax_scale)
        return self.attend_with_mask(query, key, value, attention_mask)

    def attend_with_mask(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Compute attention by :func:`fused_attention`, with the dropout of this layer.

        Args:
            query: ``[q, b, n/t, d]``.
            key: ``[k, b, g/t, d]``.
            value: same shape as ``key``.
            mask: as in :func:`fused_attention`.

        Returns:
            ``[q, b, n*d/t]``.
        """
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tensor-parallel ranks, and so must their dropout masks.
        rng_context = get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext()
        with rng_context:
            context = fused_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                mask,
                dropout,
                self.softmax_scale,
            )
        return context.permute(2, 0, 1, 3).flatten(2)


def with_core_attention(layer: Any, attention: type[nn.Module]) -> Any:
    """Return the spec of a layer with another class for the core attention."""
    inner = layer.submodules.self_attention
    inner = replace(inner, submodules=replace(inner.submodules, core_attention=attention))
    return replace(layer, submodules=replace(layer.submodules, self_attention=inner))


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Compute attention with a fused kernel of SDPA.

    Args:
        query: ``[b, n, q, d]``.
        key: ``[b, g, k, d]``; n is a multiple of g.
        value: same shape as ``key``.
        mask: None for the causal mask, with q = k, or with q = 1, the last token; or, of a shape
            that broadcasts to ``[b, n, q, k]``, what to add to the scores, or whether they count.
        dropout: probability of a score to be dropped.
        scale: factor of the scores; None for 1 / sqrt(d).

    Returns:
        ``[b, n, q, d]``.

    Raises:
        RuntimeError: on a GPU, no fused kernel supports these arguments.
    """
    groups = query.shape[1] != key.shape[1]
    if groups and query.is_cuda and (mask is not None or not _flash_supports(query)):
        # The memory-efficient kernel does not support groups.
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        groups = False
    with sdpa_kernel(_FUSED_KERNELS) if query.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and query.shape[2] > 1,  # the last token attends to all
            scale=scale,
            enable_gqa=groups,
        )


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_boundaries: Tensor,
    key_boundaries: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Compute causal attention within documents by flash attention's kernel for varied lengths.

    The last query of each document is at the position of its last key.

    Args:
        query: ``[q, b, n, d]``.
        key: ``[k, b, g, d]``.
        value: same shape as ``key``.
        query_boundaries: of the documents among the queries, see ``data/documents.py``.
        key_boundaries: of the same documents among the keys.
        scale: factor of the scores; None for 1 / sqrt(d).

    Returns:
        ``[q, b, n*d]``.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler

    length, samples, heads = query.shape[:3]
    context = varlen_attn(
        query.transpose(0, 1).flatten(0, 1),
        key.transpose(0, 1).flatten(0, 1),
        value.transpose(0, 1).flatten(0, 1),
        query_boundaries,
        key_boundaries,
        # The longest document is not known to the host. The bound only starts blocks without work.
        max_q=length,
        max_k=len(key),
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=heads != key.shape[2],
    )
    assert isinstance(context, Tensor)  # a tuple only if more is requested
    return context.view(samples, length, -1).transpose(0, 1)


def dense_mask(boundaries: Tensor, samples: int, length: int, dtype: torch.dtype) -> Tensor:
    """Return what to add to the scores of a micro-batch to restrict attention to documents.

    Args:
        boundaries: of the documents, see ``data/documents.py``.
        samples: number b of samples.
        length: number s of tokens of a sample.
        dtype: of the queries.

    Returns:
        ``[b, 1, s, s]``: 0 where the key is in the query's document and not after the query, else
        minus infinity.
    """
    positions = torch.arange(samples * length, dtype=torch.int32, device=boundaries.device)
    document = torch.bucketize(positions, boundaries, right=True).view(samples, length)
    visible = (document[:, :, None] == document[:, None, :]).tril_()
    mask = torch.zeros(visible.shape, dtype=dtype, device=boundaries.device)
    return mask.masked_fill_(~visible, -torch.inf).unsqueeze(1)


def has_document_kernel(core: TransformerConfig, dtype: torch.dtype) -> bool:
    """Whether :func:`document_attention` supports a model on this process's GPU."""
    return (
        core.attention_dropout == 0.0
        and core.kv_channels % 8 == 0
        and _flash_runs(core.kv_channels, dtype)
        and _varlen_supports_groups()
    )


def use_dense_masks(decoder: nn.Module, samples: int, length: int, dtype: torch.dtype) -> None:
    """Make a decoder replace boundaries by one dense mask, before its first layer.

    Args:
        decoder: megatron-core's TransformerBlock.
        samples: number of samples of a micro-batch.
        length: number of tokens of a sample.
        dtype: of the queries.
    """
    replace = partial(_replace_boundaries, samples, length, dtype)
    decoder.register_forward_pre_hook(replace, with_kwargs=True)


def _replace_boundaries(
    samples: int,
    length: int,
    dtype: torch.dtype,
    decoder: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    boundaries = keywords["attention_mask"]
    if boundaries is None or boundaries.dtype != torch.int32:  # already a dense mask
        return arguments, keywords
    mask = dense_mask(boundaries, samples, length, dtype)
    return arguments, {**keywords, "attention_mask": mask}


@lru_cache(maxsize=1)
def _varlen_supports_groups() -> bool:
    """Whether torch has the kernel, and for fewer keys than queries: not before torch 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _flash_supports(query: Tensor) -> bool:
    return _flash_runs(query.shape[-1], query.dtype)


def _flash_runs(head_size: int, dtype: torch.dtype) -> bool:
    capable = torch.cuda.get_device_capability() >= _FLASH_CAPABILITY
    return capable and dtype in HALF_PRECISION and head_size <= _FLASH_HEAD_SIZE
