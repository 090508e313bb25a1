"""Memory of the experts of a rank: parameters, optimizer state, activations and buffers.

The tensors of a layer are those that autograd keeps of megatron-core's router, token dispatchers
and experts, without the fused permutation.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.experts import (
    ExpertLoad,
    expert_load,
    probability_bytes,
    rank_expert_parameters,
)
from megatron_llmjp.estimate.flops import element_size
from megatron_llmjp.estimate.layout import ParallelLayout


@dataclass(frozen=True)
class ExpertMemory:
    """Share of the experts in the memory of one rank, in bytes; shared experts are not included."""

    parameters: int
    """Number of parameters."""
    weights: int
    gradients: int
    optimizer: int
    """Divided by the expert data-parallel size with the distributed optimizer."""
    activations: int
    """That one layer with experts keeps per micro-batch in its feed-forward part."""


def expert_memory(
    config: Config, layout: ParallelLayout, stage: int, fused_kernels: bool = True
) -> ExpertMemory:
    """Compute the share of the experts in :func:`rank_memory`."""
    number = rank_expert_parameters(config, layout, layout.stages[stage])
    e = element_size(config)
    shards = layout.expert_copies if config.parallel.use_distributed_optimizer else 1
    return ExpertMemory(
        parameters=number,
        weights=number * e,
        gradients=number * 4,
        optimizer=number * optimizer_bytes(config) // shards,
        activations=expert_activations(config, layout, fused_kernels) if number else 0,
    )


def optimizer_bytes(config: Config) -> int:
    """Return the bytes of the optimizer state of a parameter."""
    main = 4 if element_size(config) == 2 else 0
    momentum = 4 if config.optimizer.sgd_momentum else 0
    return main + {"adam": 8, "sgd": momentum}[config.optimizer.optimizer]


def feed_forward_tensors(config: Config, fused_kernels: bool) -> int:
    """Count the tensors of the hidden size of a feed-forward layer that it keeps.

    With SwiGLU both halves and their product; unfused also intermediate results.
    """
    gated = 3 if fused_kernels else 5
    return gated if config.model.activation_function == "swiglu" else 2


def expert_activations(config: Config, layout: ParallelLayout, fused_kernels: bool = True) -> int:
    """Compute the bytes that the router and the experts of a layer keep per micro-batch.

    Input of the experts in their order, the tensors of their hidden size (the unweighted product
    is one more where weighting by the probability is not fused), the permutation and the
    probabilities of the rows; those of shared experts; and the tensors of the router.
    """
    model, e, load = config.model, element_size(config), expert_load(config, layout)
    widths = feed_forward_tensors(config, fused_kernels)
    widths += 0 if fused_kernels and model.activation_function == "swiglu" else 1
    rows = load.rows * (model.hidden_size * e + widths * load.width * e + probability_bytes(config))
    shared = model.moe_shared_expert_intermediate_size or 0
    tokens = config.training.micro_batch_size * config.data.seq_length // layout.cp
    whole = tokens * e * shared // layout.tp
    return (
        rows
        + 8 * load.sent
        + feed_forward_tensors(config, fused_kernels) * whole
        + _router(config, load)
    )


def _router(config: Config, load: ExpertLoad) -> int:
    """Tensors of a router: scores of all experts, and indices and scores of the chosen ones."""
    model, p = config.model, probability_bytes(config)
    experts, chosen = model.num_moe_experts or 0, model.moe_router_topk
    has_loss = model.moe_router_load_balancing_type in ("aux_loss", "seq_aux_loss")
    balanced = has_loss and model.moe_aux_loss_coeff > 0
    per_expert = p + 1 + (4 if balanced else 0)  # probabilities, routing map, scores of the loss
    per_expert += p if model.moe_router_pre_softmax else 0
    per_expert += p if model.moe_router_score_function == "sigmoid" else 0
    statistics = 0
    if model.moe_z_loss_coeff:
        per_expert, statistics = per_expert + p, 4
    per_chosen = p + 16  # indices of the choice and of the scores
    return load.tokens * (experts * per_expert + chosen * per_chosen + statistics)


def expert_buffers(config: Config, layout: ParallelLayout, parts: int) -> int:
    """Temporary tensors of the backward pass of experts.

    The gradient of the layer's output, and that of the experts' output, with ``alltoall`` before
    and after a permutation.
    """
    load, e, h = expert_load(config, layout), element_size(config), config.model.hidden_size
    copies = 2 if config.parallel.moe_token_dispatcher_type == "alltoall" else 1
    return e * h * (parts * load.tokens + copies * load.rows)
