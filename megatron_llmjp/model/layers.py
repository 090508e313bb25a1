"""Transformer layers that megatron-core lacks without Transformer Engine.

What megatron-core lacks without Transformer Engine: attention and norms for every layout.

megatron-core's own fallback attention materialises ``s x s`` scores, and its fallback norm refuses
sequence parallelism. Both are replaced here by torch's kernels, on CPU and GPU alike.

GPT-NeoX's parallel residual: ``x + attention(norm1(x)) + mlp(norm2(x))``.

megatron-core's layer feeds the feed-forward network what attention made of its input; here both
read the layer's input (Wang and Komatsuzaki 2021, GPT-J; Black et al. 2022, GPT-NeoX-20B).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root mean square norm over the last dimension of ``[s, b, h]``."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device())
        _mark(self, config)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension of ``[s, b, h]``."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device())
        _mark(self, config)


def norm_class(normalization: str) -> type[nn.Module]:
    """The norm of a configuration's ``normalization``."""
    return RMSNorm if normalization == "RMSNorm" else LayerNorm


def _mark(norm: nn.Module, config: TransformerConfig) -> None:
    """Have the gradients summed over the TP group: each rank sees a part of the sequence."""
    norm.to(config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPAttention(MegatronModule):
    """Core attention by ``torch.nn.functional.scaled_dot_product_attention``."""

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
        """Attend causally.

        Args:
            query: ``[s, b, n/t, d]``, the n heads split over t tensor parallel ranks.
            key: ``[s, b, g/t, d]`` with g query groups.
            value: like ``key``.
            attention_mask: None for the causal mask, or ``[b, 1, s, s]``, true where masked.

        Returns:
            ``[s, b, n*d/t]``.
        """
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tensor-parallel ranks, and so must their dropout masks.
        random = get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext()
        with random:
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).flatten(2)


class ParallelResidualLayer(TransformerLayer):
    """A layer whose two halves both read its input; parameters and names are megatron-core's."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Run the layer.

        Args:
            hidden_states: ``[s, b, h]``, or ``[s/t, b, h]`` with sequence parallelism.
            args: as megatron-core's layer takes them.
            kwargs: likewise.

        Returns:
            The output, shaped like the input; the context, unchanged.
        """
        kwargs.pop("dynamic_inference_decode_only", None)
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        output_with_bias = self.mlp(self._forward_pre_mlp_layernorm(hidden_states))
        # What attention added to the residual stream is the residual of the second sum.
        return self._forward_post_mlp(output_with_bias, attended), context
