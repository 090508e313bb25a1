"""How many parameters a model has, worked out from its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameters of a whole model by where they are."""

    embedding: int
    """Word embeddings, with the padding rows."""
    positions: int
    """The table of learned positions."""
    layer: int
    """One transformer layer."""
    layers: int
    """Number of layers."""
    final_norm: int
    output: int
    """The output layer; 0 when it is tied to the embedding."""

    @property
    def total(self) -> int:
        """All of them, tied weights once."""
        return (
            self.embedding
            + self.positions
            + self.layer * self.layers
            + self.final_norm
            + self.output
        )

    @property
    def non_embedding(self) -> int:
        """Without word embeddings and output layer, as model cards count."""
        return self.total - self.embedding - self.output


def count_parameters(config: Config) -> Parameters:
    """Parameters of the model that a configuration describes, over all ranks.

    Raises:
        ValueError: the vocabulary's size is not known yet.
    """
    model = config.model
    words = config.padded_vocab_size * model.hidden_size
    learned = model.position_embedding_type == "learned_absolute"
    return Parameters(
        embedding=words,
        positions=config.max_positions * model.hidden_size if learned else 0,
        layer=2 * norm_parameters(model) + _attention(model) + _feed_forward(model),
        layers=model.num_layers,
        final_norm=norm_parameters(model),
        output=words if model.untie_embeddings_and_output_weights else 0,
    )


def norm_parameters(model: ModelConfig) -> int:
    """Parameters of one norm: a weight, and a bias with LayerNorm."""
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def _attention(model: ModelConfig) -> int:
    queries = model.num_attention_heads * model.head_dim
    projected = queries + 2 * model.query_groups * model.head_dim
    biases = projected if model.add_bias_linear or model.add_qkv_bias else 0
    biases += model.hidden_size if model.add_bias_linear else 0
    return model.hidden_size * (projected + queries) + biases


def _feed_forward(model: ModelConfig) -> int:
    wide = model.ffn_size * (2 if model.activation_function == "swiglu" else 1)
    biases = wide + model.hidden_size if model.add_bias_linear else 0
    return model.hidden_size * (wide + model.ffn_size) + biases
