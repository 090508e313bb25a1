"""Layers of Transformer Engine: layer spec, attention within documents, gradient accumulation."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_llmjp.model.attention import (
    HALF_PRECISION,
    SDPAttention,
    has_document_kernel,
    with_core_attention,
)
from megatron_llmjp.model.context_parallel_attention import ContextParallelAttention
from megatron_llmjp.parallel.device import Device

_CUDNN_CAPABILITY = (9, 0)
"""Oldest compute capability on which cuDNN supports sequences of different lengths: Hopper's."""


class DocumentAttention(TEDotProductAttention):
    """Transformer Engine's attention, restricted to documents.

    Its mask type in megatron-core's layer spec is causal, with which it ignores a mask.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        **keywords: Any,
    ) -> Tensor:
        """Compute causal attention.

        Args:
            query: ``[s, b, n/t, d]``, the n heads split over t tensor parallel ranks.
            key: ``[s, b, g/t, d]``, g query groups.
            value: same shape as ``key``.
            attention_mask: the boundaries of the documents, an int32 tensor
                (``data/documents.py``); or a dense mask ``[b, 1, s, s]``, not 0 where masked.
            attn_mask_type: mask type of the layer spec, used without a mask.
            keywords: as in megatron-core's attention.

        Returns:
            ``[s, b, n*d/t]``.
        """
        if attention_mask is None:
            context = super().forward(query, key, value, None, attn_mask_type, **keywords)
        elif attention_mask.dtype == torch.int32:
            context = self._attend_within(query, key, value, attention_mask)
        else:
            is_masked, kind = attention_mask != 0, AttnMaskType.arbitrary
            context = super().forward(query, key, value, is_masked, kind, **keywords)
        assert isinstance(context, Tensor)
        return context

    def _attend_within(
        self, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor
    ) -> Tensor:
        """Attend within documents as sequences of different lengths."""
        length, samples = query.shape[:2]
        documents = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            # The longest document is not known to the host.
            max_seqlen_q=length,
            max_seqlen_kv=length,
        )
        packed = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        context = super().forward(*packed, None, AttnMaskType.causal, packed_seq_params=documents)
        return context.view(samples, length, -1).transpose(0, 1).contiguous()


def choose_document_attention(
    core: TransformerConfig, dtype: torch.dtype, device: Device
) -> tuple[type[nn.Module], bool]:
    """Return the attention for documents, and whether it accepts their boundaries.

    Otherwise it needs a dense mask: Transformer Engine's unfused attention, its only kernel for
    fp32, would hold the scores of each document as if it were a whole sequence. Under context
    parallelism its sequences of different lengths would have to be multiples of twice its size.
    """
    if core.context_parallel_size > 1:
        return ContextParallelAttention, device.is_cuda and has_document_kernel(core, dtype)
    if _supports_boundaries(dtype, device):
        return DocumentAttention, True
    if device.is_cuda and has_document_kernel(core, dtype):
        return SDPAttention, True
    return DocumentAttention, False


def _supports_boundaries(dtype: torch.dtype, device: Device) -> bool:
    """Whether Transformer Engine has a fused kernel for sequences of different lengths."""
    if not device.is_cuda or dtype not in HALF_PRECISION:
        return False
    capability = torch.cuda.get_device_capability()
    return capability >= _CUDNN_CAPABILITY or find_spec("flash_attn") is not None


def transformer_engine_layer_spec(
    layer: type[nn.Module],
    attention: type[nn.Module] | None = None,
    qk_layernorm: bool = False,
    experts: int | None = None,
    grouped_gemm: bool = False,
) -> Any:
    """Return the spec of a layer built from Transformer Engine's modules.

    Args:
        layer: class of the layer.
        attention: class of the core attention, in place of Transformer Engine's.
        qk_layernorm: normalize queries and keys.
        experts: number of experts; None for a dense layer.
        grouped_gemm: whether the experts of a rank are one grouped matrix multiplication.
    """
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts, moe_grouped_gemm=grouped_gemm, qk_layernorm=qk_layernorm
    )
    spec = replace(spec, module=layer)
    return spec if attention is None else with_core_attention(spec, attention)


def accumulate_weight_gradients(model: nn.Module) -> None:
    """Let the matrix multiplications of the layers add weight gradients to the sums of a step.

    megatron-core's ``gradient_accumulation_fusion`` does that for all linear layers at once, and
    requires Apex for those outside Transformer Engine, such as the output layer.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
