"""GPT-NeoX's parallel residual: ``x + attention(norm1(x)) + mlp(norm2(x))``.

megatron-core's layer feeds the feed-forward network what attention made of its input; here both
read the layer's input (Wang and Komatsuzaki 2021, GPT-J; Black et al. 2022, GPT-NeoX-20B).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    from megatron.core.transformer.transformer_layer import TransformerLayer


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
