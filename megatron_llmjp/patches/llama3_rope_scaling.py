"""Fix of LLaMA 3's rotary frequency scaling, of which GPTModel passes on the factor only.

What: ``inv_freq`` of one ``RotaryEmbedding``.

Why: ``GPTModel`` and ``RotaryEmbedding`` take ``rope_scaling_factor``, but always use the other
constants of LLaMA 3.1 (low and high frequency factor 1 and 4, 8192 original positions).

Remove when ``GPTModel`` takes these constants as parameters. Not the case in megatron-core 0.16.1.
"""

from __future__ import annotations

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_llmjp.config.expert_config import ModelConfig


def scale_rotary_frequencies(rotary: RotaryEmbedding, model: ModelConfig) -> None:
    """Scale the frequencies of a ``RotaryEmbedding`` without scaling by the model's constants."""
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq,
        factor=model.rope_scaling_factor,
        low_freq_factor=model.rope_scaling_low_freq_factor,
        high_freq_factor=model.rope_scaling_high_freq_factor,
        original_max_position_embeddings=model.rope_scaling_original_max_position_embeddings,
    )
