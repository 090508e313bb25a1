"""Tokens, matrices and messages of a layer with experts on one rank.

The load is assumed to be balanced: all experts of a layer get the same number of tokens, as the
load balancing of the router aims for. A rank with busier experts needs more memory and time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.pipeline_layout import ModelChunk
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.flops import element_size
from megatron_llmjp.estimate.layout import ParallelLayout, recomputed_layer_numbers


@dataclass(frozen=True)
class ExpertLoad:
    """Load of the experts of one layer on one rank, per micro-batch."""

    tokens: int
    """Tokens that the rank routes."""
    sent: int
    """Copies of them for their experts, with padding."""
    rows: int
    """Rows of the matrices that its experts multiply."""
    local_experts: int
    """Experts of the rank, whole or, with expert tensor parallelism, parts of them."""
    width: int
    """Hidden size of an expert, or of the rank's part of it."""


@dataclass(frozen=True)
class ExpertTraffic:
    """Bytes that a rank sends to other ranks of the experts, of one layer and micro-batch."""

    forward: int
    """Tokens to their experts and back; sent again if the layer is recomputed."""
    backward: int
    """Their gradients."""


def probability_bytes(config: Config) -> int:
    """Return the bytes of a router's logit or probability."""
    sizes = {"fp32": 4, "fp64": 8, None: element_size(config)}
    return sizes[config.model.moe_router_dtype]


def count_expert_layers(config: Config, chunks: Sequence[ModelChunk]) -> int:
    """Count the layers with experts of a stage."""
    layers = config.model.expert_layers
    return sum(sum(layers[c.first_layer : c.first_layer + c.layers]) for c in chunks)


def count_recomputed_experts(config: Config, chunks: Sequence[ModelChunk]) -> int:
    """Count the layers with experts of a stage that are recomputed as a whole."""
    layers = config.model.expert_layers
    return sum(layers[i] for chunk in chunks for i in recomputed_layer_numbers(config, chunk))


def rank_expert_parameters(
    config: Config, layout: ParallelLayout, chunks: Sequence[ModelChunk]
) -> int:
    """Count the parameters of the experts of one rank of a stage, without shared experts.

    Their gradients and optimizer state belong to the expert data-parallel group.
    """
    experts = count_parameters(config, layout.tp, layout.ep * layout.etp).experts
    return experts * count_expert_layers(config, chunks)


def expert_load(config: Config, layout: ParallelLayout) -> ExpertLoad:
    """Compute the load of a layer with experts.

    The capacity is that of megatron-core's ``moe_utils.get_capacity``.
    """
    model = config.model
    tokens = config.training.micro_batch_size * config.data.seq_length // layout.cp
    tokens //= layout.tp if config.parallel.sequence_parallel else 1
    experts, sent = model.num_moe_experts or 1, tokens * model.moe_router_topk
    if model.moe_expert_capacity_factor is not None:
        capacity = experts * ceil(sent / experts * model.moe_expert_capacity_factor)
        sent = capacity if model.moe_pad_expert_input_to_capacity else min(sent, capacity)
    return ExpertLoad(
        tokens, sent, sent * layout.etp, experts // layout.ep, model.expert_ffn_size // layout.etp
    )


def expert_traffic(config: Config, layout: ParallelLayout) -> ExpertTraffic:
    """Compute the bytes of a layer, with the collectives of megatron-core's token dispatchers.

    ``alltoall``: each rank sends the tokens, with their probabilities, to the EP ranks of their
    experts, the ranks that share experts gather them, and the results are returned likewise.
    ``allgather``: the EP x expert tensor parallel ranks gather all tokens, probabilities and the
    routing map, and reduce and scatter the results in the dtype of the probabilities.
    """
    load, h = expert_load(config, layout), config.model.hidden_size
    e, p = element_size(config), probability_bytes(config)
    if config.parallel.moe_token_dispatcher_type == "alltoall":
        # Of the gathered rows, each of the etp ranks sends its own to etp - 1 others.
        others = load.sent * (layout.ep - 1) // layout.ep + load.sent * (layout.etp - 1)
        size = others * (2 * h * e + p)
        return ExpertTraffic(size, size)
    experts = config.model.num_moe_experts or 1
    others = load.tokens * (layout.ep * layout.etp - 1)
    size = others * (h * e + h * p + experts * p)
    return ExpertTraffic(size + others * experts, size)


def experts_traffic_per_step(
    config: Config, layout: ParallelLayout, chunks: Sequence[ModelChunk]
) -> int:
    """Return the bytes that a rank of a stage sends to other ranks of the experts per step."""
    number = count_expert_layers(config, chunks)
    if not number:
        return 0
    one = expert_traffic(config, layout)
    again = count_recomputed_experts(config, chunks)
    size = number * (one.forward + one.backward) + again * one.forward
    return layout.micro_batches * size
