"""Parameter counts of a model, computed from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by component, in total or on one tensor-parallel rank."""

    embedding: int
    """Word embeddings, padding rows included."""
    positions: int
    """Learned position embeddings; 0 with rotary embeddings."""
    layer: int
    """One transformer layer."""
    layers: int
    """Number of layers."""
    final_norm: int
    output: int
    """The output layer; 0 when it is tied to the embedding."""

    @property
    def total(self) -> int:
        """All parameters, tied weights counted once."""
        return (
            self.embedding
            + self.positions
            + self.layer * self.layers
            + self.final_norm
            + self.output
        )

    @property
    def non_embedding(self) -> int:
        """All parameters except word embeddings and output layer, as model cards count them."""
        return self.total - self.embedding - self.output


def count_parameters(config: Config, tensor_parallel_size: int = 1) -> ParameterCounts:
    """Count the parameters of a model, or those that one tensor-parallel rank of it holds.

    Raises:
        ValueError: the vocabulary size is not resolved yet.
    """
    model = config.model
    words = config.padded_vocab_size // tensor_parallel_size * model.hidden_size
    learned = model.position_embedding_type == "learned_absolute"
    return ParameterCounts(
        embedding=words,
        positions=config.max_positions * model.hidden_size if learned else 0,
        layer=layer_parameters(model, tensor_parallel_size),
        layers=model.num_layers,
        final_norm=_norm_parameters(model, model.hidden_size),
        output=words if model.untie_embeddings_and_output_weights else 0,
    )


def layer_parameters(model: ModelConfig, tensor_parallel_size: int = 1) -> int:
    """Count the parameters of one layer on one of ``tensor_parallel_size`` ranks.

    Norms and the biases of the two row-parallel products are replicated on all ranks.
    """
    h, t = model.hidden_size, tensor_parallel_size
    queries = model.num_attention_heads * model.head_dim
    projected = queries + 2 * model.query_groups * model.head_dim
    wide = model.ffn_size * (2 if model.activation_function == "swiglu" else 1)
    total = _layer_norm_parameters(model) + h * (projected + queries + wide + model.ffn_size) // t
    if model.add_bias_linear or model.add_qkv_bias:
        total += projected // t
    return total + (wide // t + 2 * h if model.add_bias_linear else 0)


def _layer_norm_parameters(model: ModelConfig) -> int:
    """Norms before attention and feed-forward, and those of queries and keys."""
    heads = 2 * _norm_parameters(model, model.head_dim) if model.qk_layernorm else 0
    return 2 * _norm_parameters(model, model.hidden_size) + heads


def _norm_parameters(model: ModelConfig, size: int) -> int:
    """One weight vector, plus a bias with LayerNorm."""
    return size * (2 if model.normalization == "LayerNorm" else 1)
