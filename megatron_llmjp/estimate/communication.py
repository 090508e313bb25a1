"""Communication volume of a rank per step, by kind, in bytes.

Ring algorithms are assumed: with k ranks, each sends (k - 1) / k of the tensor for an all-gather or
a reduce-scatter, and twice that for an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.experts import (
    count_expert_layers,
    count_recomputed_experts,
    experts_traffic_per_step,
    rank_expert_parameters,
)
from megatron_llmjp.estimate.flops import element_size
from megatron_llmjp.estimate.layout import ParallelLayout, recomputed_layers
from megatron_llmjp.estimate.memory import gathers_keys, rank_parameters


@dataclass(frozen=True)
class CommunicationVolume:
    """Bytes that one rank sends per step."""

    tensor: int
    """Activations within the tensor-parallel group."""
    pipeline: int
    """Activations and their gradients to the neighbouring stages."""
    gradients: int
    """Gradients within the data-parallel group."""
    parameters: int
    """Updated parameters within the data-parallel group (distributed optimizer)."""
    embedding: int
    """Gradients of tied embeddings, between the first and the last stage."""
    context: int = 0
    """Keys, values and their gradients within the context-parallel group."""
    experts: int = 0
    """Tokens and their gradients within the group of ranks with different (parts of) experts."""
    expert_gradients: int = 0
    """Gradients of experts within the expert data-parallel group."""
    expert_parameters: int = 0
    """Updated parameters of experts within the expert data-parallel group."""


def communication_volume(
    config: Config, layout: ParallelLayout, stage: int, fused_kernels: bool = True
) -> CommunicationVolume:
    """Compute the bytes that a rank of pipeline stage ``stage`` sends per step.

    Args:
        config: the run's configuration.
        layout: its parallel layout.
        stage: from 0.
        fused_kernels: whether attention is Transformer Engine's where it supports the run.
    """
    model, e, t = config.model, element_size(config), layout.tp
    tokens = config.training.micro_batch_size * config.data.seq_length // layout.cp
    activation = tokens * model.hidden_size * e
    chunks = layout.stages[stage]
    experts = rank_expert_parameters(config, layout, chunks)
    parameters = rank_parameters(config, layout, chunks) - experts
    parts = t if config.parallel.sequence_parallel else 1
    tied = not model.untie_embeddings_and_output_weights and layout.pp > 1
    ends = stage in (0, layout.pp - 1)
    words = config.padded_vocab_size // t * model.hidden_size
    copies, expert_copies = layout.copies, layout.expert_copies
    distributed = config.parallel.use_distributed_optimizer
    # With EP dense parameters and experts have an optimizer each, which gathers all parameters
    # unless that overlaps with the next forward pass (megatron-core 0.16.1).
    gathers = 2 if experts and layout.ep > 1 and not config.parallel.overlap_param_gather else 1
    reduced, reduced_experts = _ring(4 * parameters, copies), _ring(4 * experts, expert_copies)
    return CommunicationVolume(
        tensor=layout.micro_batches * _tensor_units(config, layout, stage) * _ring(activation, t),
        pipeline=layout.micro_batches * _crossings(layout, stage) * activation // parts,
        gradients=reduced if distributed else 2 * reduced,
        parameters=gathers * _ring(e * parameters, copies) if distributed else 0,
        embedding=2 * _ring(4 * words, 2) if tied and ends else 0,
        context=layout.micro_batches * _context(config, layout, stage, fused_kernels),
        experts=experts_traffic_per_step(config, layout, chunks),
        expert_gradients=reduced_experts if distributed else 2 * reduced_experts,
        expert_parameters=gathers * _ring(e * experts, expert_copies) if distributed else 0,
    )


def _ring(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks


def _crossings(layout: ParallelLayout, stage: int) -> int:
    """Count the activations and gradients that a stage sends to its neighbours per micro-batch."""
    last = layout.pp * layout.vp - 1
    chunks = [stage + layout.pp * v for v in range(layout.vp)]
    return sum((chunk < last) + (chunk > 0) for chunk in chunks) if layout.pp > 1 else 0


def _context(config: Config, layout: ParallelLayout, stage: int, fused_kernels: bool) -> int:
    """Count the bytes of context parallelism per micro-batch.

    Each of c ranks sends its keys and values to c - 1 others: once in the forward pass, and again
    if the attention is recomputed. In the backward pass gathered ones have their gradients
    reduced and scattered; ring attention (Liu et al., 2023, arXiv:2310.01889) sends keys and values
    once more, and their gradients.
    """
    chunks = layout.stages[stage]
    layers = sum(chunk.layers for chunk in chunks)
    selective = config.parallel.recomputes_attention
    recomputed = layers if selective else recomputed_layers(config, chunks)
    passes = layers * (2 if gathers_keys(config, fused_kernels) else 3) + recomputed
    tokens = config.training.micro_batch_size * config.data.seq_length // layout.cp
    groups = 2 * config.model.query_groups * config.model.head_dim // layout.tp
    return passes * (layout.cp - 1) * tokens * groups * element_size(config)


def _tensor_units(config: Config, layout: ParallelLayout, stage: int) -> int:
    """Count the all-gathers and reduce-scatters of one activation per micro-batch."""
    parallel = config.parallel
    chunks = layout.stages[stage]
    layers = sum(chunk.layers for chunk in chunks)
    # Two pairs of column- and row-parallel products, each with an all-reduce in the forward and one
    # in the backward pass; with sequence parallelism an all-gather and a reduce-scatter instead,
    # and another all-gather for the weight gradient.
    forward, backward = 4, 6 if parallel.sequence_parallel else 4
    units = layers * (forward + backward) + recomputed_layers(config, chunks) * forward
    if not config.model.moe_shared_expert_intermediate_size:  # experts have no such products
        alone = count_expert_layers(config, chunks) * (forward + backward)
        units -= (alone + count_recomputed_experts(config, chunks) * forward) // 2
    if any(chunk.embedding for chunk in chunks):
        units += 2
    if any(chunk.output for chunk in chunks):
        units += 3 if parallel.sequence_parallel else 2
    return units
