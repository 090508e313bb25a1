"""What a rank sends in one step, by kind, in bytes; with rings, of which each rank sends a part.

A ring of k ranks sends (k - 1) / k of the tensor from each for a gather or a scatter, and twice
that for an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.layout import Layout
from megatron_llmjp.estimate.memory import element_size, rank_parameters


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in a step."""

    tensor: int
    """Activations among the ranks of a layer."""
    pipeline: int
    """Activations and their gradients to the neighbouring stages."""
    gradients: int
    """Gradients among replicas."""
    parameters: int
    """Updated parameters among replicas (distributed optimizer)."""
    embedding: int
    """Gradients of tied embeddings, between the first and last stage."""

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(getattr(self, field.name) for field in fields(self))


def communicate(config: Config, layout: Layout, stage: int) -> Communication:
    """What a rank of pipeline stage ``stage`` sends in one step."""
    model, e, t = config.model, element_size(config), layout.tp
    tokens = config.training.micro_batch_size * config.data.seq_length // layout.cp
    activation = tokens * model.hidden_size * e
    chunks = layout.stages[stage]
    parameters = rank_parameters(config, layout, chunks)
    neighbours = _crossings(layout, stage)
    parts = t if config.parallel.sequence_parallel else 1
    tied = not model.untie_embeddings_and_output_weights and layout.pp > 1
    ends = stage in (0, layout.pp - 1)
    words = config.padded_vocab_size // t * model.hidden_size
    copies = layout.dp * layout.cp
    distributed = config.parallel.use_distributed_optimizer
    reduced = _ring(4 * parameters, copies)
    return Communication(
        tensor=layout.micro_batches
        * round(_tensor_units(config, layout, stage) * _ring(activation, t)),
        pipeline=layout.micro_batches * neighbours * activation // parts,
        gradients=reduced if distributed else 2 * reduced,
        parameters=_ring(e * parameters, copies) if distributed else 0,
        embedding=2 * _ring(4 * words, 2) if tied and ends else 0,
    )


def _ring(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks


def _crossings(layout: Layout, stage: int) -> int:
    """Activations sent forward and gradients sent back by a stage for one micro-batch."""
    last = layout.pp * layout.vp - 1
    chunks = [stage + layout.pp * v for v in range(layout.vp)]
    return sum((chunk < last) + (chunk > 0) for chunk in chunks) if layout.pp > 1 else 0


def _tensor_units(config: Config, layout: Layout, stage: int) -> float:
    """Gathers and scatters of one activation for one micro-batch over the ranks of a layer."""
    parallel = config.parallel
    chunks = layout.stages[stage]
    layers = sum(chunk.layers for chunk in chunks)
    # Two pairs of column- and row-parallel products, an all-reduce each way for both; with
    # sequence parallelism a gather and a scatter instead, and a gather for the weight gradient.
    forward, backward = 4, 6 if parallel.sequence_parallel else 4
    again = 0.0
    if parallel.recompute_granularity == "full":
        whole = parallel.recompute_method != "block"
        part = 1.0 if whole else min(1.0, (parallel.recompute_num_layers or 1) / max(layers, 1))
        again = forward * part
    units = layers * (forward + backward + again)
    if any(chunk.embedding for chunk in chunks):
        units += 2
    if any(chunk.output for chunk in chunks):
        units += 3 if parallel.sequence_parallel else 2
    return units
