"""Transformer layers without Transformer Engine: norms, attention, parallel residual.

megatron-core's local attention materializes ``s x s`` scores, and its local norm does not support
sequence parallelism. torch's kernels replace both, on CPU and GPU.

GPT-NeoX's parallel residual is ``x + attention(norm1(x)) + mlp(norm2(x))``: attention and MLP both
read the layer's input, whereas in megatron-core's layer the MLP reads the output of attention
(Wang and Komatsuzaki 2021, GPT-J; Black et al. 2022, GPT-NeoX-20B).
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
        _mark_sequence_parallel(self, config)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension of ``[s, b, h]``."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device())
        _mark_sequence_parallel(self, config)


def norm_class(normalization: str) -> type[nn.Module]:
    """Return the norm class of the configuration's ``normalization``."""
    return RMSNorm if normalization == "RMSNorm" else LayerNorm


def _mark_sequence_parallel(norm: nn.Module, config: TransformerConfig) -> None:
    """Mark parameters whose gradients are summed over the TP group with sequence parallelism."""
    norm.to(config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPAttention(MegatronModule):
    """Core attention with ``torch.nn.functional.scaled_dot_product_attention``."""

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
            query: ``[s, b, n/t, d]``, the n heads split over t tensor parallel ranks.
            key: ``[s, b, g/t, d]``, g query groups.
            value: same shape as ``key``.
            attention_mask: None for the causal mask, or ``[b, 1, s, s]``, true where masked.

        Returns:
            ``[s, b, n*d/t]``.
        """
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tensor-parallel ranks, and so must their dropout masks.
        rng_context = get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext()
        with rng_context:
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
    """Layer with a parallel residual; parameters and their names are megatron-core's."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Run the layer.

        Args:
            hidden_states: ``[s, b, h]``, or ``[s/t, b, h]`` with sequence parallelism.
            args: as in megatron-core's TransformerLayer.
            kwargs: as in megatron-core's TransformerLayer.

        Returns:
            The output, with the shape of the input; the context, unchanged.
        """
        kwargs.pop("dynamic_inference_decode_only", None)
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        output_with_bias = self.mlp(self._forward_pre_mlp_layernorm(hidden_states))
        # The residual of the MLP is the residual stream after attention.
        return self._forward_post_mlp(output_with_bias, attended), context
