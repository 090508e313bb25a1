"""Transformer layers without Transformer Engine: norms and the parallel residual.

megatron-core's local norm does not support sequence parallelism; torch's replace it.

GPT-NeoX's parallel residual is ``x + attention(norm1(x)) + mlp(norm2(x))``: attention and MLP both
read the layer's input, whereas in megatron-core's layer the MLP reads the output of attention
(Wang and Komatsuzaki 2021, GPT-J; Black et al. 2022, GPT-NeoX-20B).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
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


def with_norms(layer: Any, norm: type[nn.Module], has_experts: bool = False) -> Any:
    """Return the spec of a layer with another class for its norms, those of queries and keys too.

    Norms of the head size ``[d]``, which are the same on all tensor-parallel ranks: megatron-core
    sums their gradients over the ranks, each of which has its own heads (``finalize_model_grads``).
    The norm before experts is stored under the name that it has in Transformer Engine's layers, so
    that checkpoints do not depend on the kind of layers.
    """
    attention = layer.submodules.self_attention
    changed: dict[str, Any] = {"input_layernorm": norm, "pre_mlp_layernorm": norm}
    if attention.submodules.q_layernorm is not IdentityOp:
        heads = replace(attention.submodules, q_layernorm=norm, k_layernorm=norm)
        changed["self_attention"] = replace(attention, submodules=heads)
    if has_experts:  # the norm is not a part of a linear layer in Transformer Engine's layers
        names = layer.submodules.sharded_state_dict_keys_map
        changed["sharded_state_dict_keys_map"] = {
            name: stored for name, stored in names.items() if name != "pre_mlp_layernorm."
        }
    return replace(layer, submodules=replace(layer.submodules, **changed))


def _mark_sequence_parallel(norm: nn.Module, config: TransformerConfig) -> None:
    """Mark parameters whose gradients are summed over the TP group with sequence parallelism."""
    norm.to(config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


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
