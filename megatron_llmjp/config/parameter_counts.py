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
    """One transformer layer without experts."""
    layers: int
    """Number of layers without experts."""
    final_norm: int
    output: int
    """The output layer; 0 when it is tied to the embedding."""
    expert_layer: int = 0
    """One transformer layer with experts."""
    expert_layers: int = 0
    """Number of layers with experts."""
    unused_experts: int = 0
    """The experts of one layer that a token is not routed to."""
    experts: int = 0
    """The experts of one layer, which are part of ``expert_layer``."""

    @property
    def total(self) -> int:
        """All parameters, tied weights counted once."""
        return (
            self.embedding
            + self.positions
            + self.layer * self.layers
            + self.expert_layer * self.expert_layers
            + self.final_norm
            + self.output
        )

    @property
    def non_embedding(self) -> int:
        """All parameters except word embeddings and output layer, as model cards count them."""
        return self.total - self.embedding - self.output

    @property
    def active(self) -> int:
        """Parameters that a token uses: all of a dense model, otherwise its experts only."""
        return self.total - self.unused_experts * self.expert_layers


def count_parameters(
    config: Config, tensor_parallel_size: int = 1, expert_ranks: int = 1
) -> ParameterCounts:
    """Count the parameters of a model, or those that one rank of it holds.

    Args:
        config: the run's configuration.
        tensor_parallel_size: number of ranks among which the layers are divided.
        expert_ranks: number of ranks among which the experts of a layer are divided, EP x expert
            tensor parallel size.

    Raises:
        ValueError: the vocabulary size is not resolved yet.
    """
    model = config.model
    words = config.padded_vocab_size // tensor_parallel_size * model.hidden_size
    learned = model.position_embedding_type == "learned_absolute"
    with_experts = sum(model.expert_layers)
    return ParameterCounts(
        embedding=words,
        positions=config.max_positions * model.hidden_size if learned else 0,
        layer=layer_parameters(model, tensor_parallel_size),
        layers=model.num_layers - with_experts,
        final_norm=_norm_parameters(model, model.hidden_size),
        output=words if model.untie_embeddings_and_output_weights else 0,
        expert_layer=_expert_layer_parameters(model, tensor_parallel_size, expert_ranks),
        expert_layers=with_experts,
        unused_experts=((model.num_moe_experts or 0) - model.moe_router_topk)
        * _feed_forward(model, model.expert_ffn_size)
        if with_experts
        else 0,
        experts=_expert_parameters(model, expert_ranks),
    )


def transformer_parameters(model: ModelConfig) -> int:
    """Count the parameters of all layers, without embeddings and output layer."""
    with_experts = sum(model.expert_layers)
    dense = (model.num_layers - with_experts) * layer_parameters(model)
    return dense + with_experts * _expert_layer_parameters(model, 1, 1)


def layer_parameters(model: ModelConfig, tensor_parallel_size: int = 1) -> int:
    """Count the parameters of one dense layer on one of ``tensor_parallel_size`` ranks.

    Norms and the biases of the two row-parallel products are replicated on all ranks.
    """
    h, t = model.hidden_size, tensor_parallel_size
    queries = model.num_attention_heads * model.head_dim
    projected = queries + 2 * model.query_groups * model.head_dim
    total = _layer_norm_parameters(model) + h * (projected + queries) // t
    total += _feed_forward(model, model.ffn_size) // t
    if model.add_bias_linear or model.add_qkv_bias:
        total += projected // t
    wide = model.ffn_size * (2 if model.activation_function == "swiglu" else 1)
    return total + (wide // t + 2 * h if model.add_bias_linear else 0)


def _feed_forward(model: ModelConfig, width: int) -> int:
    """Weights of a feed-forward layer, or of an expert, of this hidden size."""
    matrices = 3 if model.activation_function == "swiglu" else 2
    return matrices * model.hidden_size * width


def _expert_layer_parameters(model: ModelConfig, tensor_parallel_size: int, ranks: int) -> int:
    """Count the parameters of one layer with experts; they have no biases."""
    if model.num_moe_experts is None:
        return 0
    shared = model.moe_shared_expert_intermediate_size or 0
    attention = layer_parameters(model, tensor_parallel_size)
    attention -= _feed_forward(model, model.ffn_size) // tensor_parallel_size
    router = model.hidden_size * (model.num_moe_experts + model.moe_shared_expert_gate)
    attention += router + _feed_forward(model, shared) // tensor_parallel_size
    return attention + _expert_parameters(model, ranks)


def _expert_parameters(model: ModelConfig, ranks: int) -> int:
    """Count the parameters of the experts of one layer on one of ``ranks`` ranks."""
    return (model.num_moe_experts or 0) * _feed_forward(model, model.expert_ffn_size) // ranks


def _layer_norm_parameters(model: ModelConfig) -> int:
    """Norms before attention and feed-forward, and those of queries and keys."""
    heads = 2 * _norm_parameters(model, model.head_dim) if model.qk_layernorm else 0
    return 2 * _norm_parameters(model, model.hidden_size) + heads


def _norm_parameters(model: ModelConfig, size: int) -> int:
    """One weight vector, plus a bias with LayerNorm."""
    return size * (2 if model.normalization == "LayerNorm" else 1)
