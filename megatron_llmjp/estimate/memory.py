"""Peak memory of a rank by kind, computed from the configuration.

The activations that a layer keeps for its backward pass were derived operation by operation from
autograd's saved tensors, for unfused (CPU) and fused (GPU) kernels; the tests compare the sum with
the peak that torch's profiler measures. In the formulas, n is the number of tokens of a micro-batch
on one rank and e the bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_llmjp.config.loss_chunks import loss_chunk_tokens
from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.pipeline_layout import ModelChunk
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.expert_memory import (
    expert_activations,
    expert_buffers,
    feed_forward_tensors,
    optimizer_bytes,
)
from megatron_llmjp.estimate.experts import (
    count_expert_layers,
    rank_expert_parameters,
    recomputes_experts,
)
from megatron_llmjp.estimate.flops import element_size
from megatron_llmjp.estimate.layout import ParallelLayout


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, of all micro-batches in flight."""
    logits: int
    """Logits, which their gradient replaces."""
    buffers: int
    """Gathered inputs and gradients of the layer, or chunk of the loss, that is being computed."""

    @property
    def total(self) -> int:
        """Sum over all kinds."""
        return sum(getattr(self, field.name) for field in fields(self))


def rank_parameters(config: Config, layout: ParallelLayout, chunks: Sequence[ModelChunk]) -> int:
    """Count the parameters of one rank of a stage, including its copy of tied embeddings."""
    counts = count_parameters(config, layout.tp, layout.ep * layout.etp)
    tied_copy = counts.embedding if layout.pp > 1 else 0
    total = 0
    for chunk in chunks:
        experts = count_expert_layers(config, [chunk])
        total += (chunk.layers - experts) * counts.layer + experts * counts.expert_layer
        if chunk.embedding:
            total += counts.embedding + counts.positions
        if chunk.output:
            total += counts.final_norm + (counts.output or tied_copy)
    return total


def rank_memory(
    config: Config, layout: ParallelLayout, stage: int, fused_kernels: bool = True
) -> RankMemory:
    """Compute the peak memory of a rank of pipeline stage ``stage``.

    Args:
        config: the run's configuration.
        layout: its parallel layout.
        stage: from 0.
        fused_kernels: whether norms, activation functions, rotary embeddings and dropout are one
            kernel each and attention keeps no scores, as on GPUs; False for torch on a CPU.
    """
    chunks = layout.stages[stage]
    parameters, e = rank_parameters(config, layout, chunks), element_size(config)
    states = optimizer_bytes(config)
    experts = rank_expert_parameters(config, layout, chunks)
    distributed = config.parallel.use_distributed_optimizer
    shards = layout.copies if distributed else 1
    expert_shards = layout.expert_copies if distributed else 1
    kept, recomputed = _activations(config, layout, stage, fused_kernels)
    has_output = any(chunk.output for chunk in chunks)
    logits = output = 0
    if has_output:
        chunk = _loss_chunk(config, layout, gpu=fused_kernels)
        logits, output = _logits(config, layout), max(_output_buffers(config, layout), chunk)
    # The peak is the largest of three: the backward pass of the loss, of the output layer, or of a
    # transformer layer, when part of it is recomputed and the logits are freed.
    layer = _layer_buffers(config, layout, stage, fused_kernels)
    layer += _context_buffers(config, layout, fused_kernels)
    more = max(0, recomputed + layer - logits - output)
    recomputed = min(more, recomputed)
    return RankMemory(
        weights=parameters * e,
        gradients=parameters * 4,
        optimizer=(parameters - experts) * states // shards + experts * states // expert_shards,
        activations=kept + recomputed,
        logits=logits,
        buffers=output + more - recomputed,
    )


def layer_activations(
    config: Config, layout: ParallelLayout, fused_kernels: bool = True, experts: bool = False
) -> int:
    """Compute the bytes that one layer keeps per micro-batch without recomputation.

    Args:
        config: the run's configuration.
        layout: its parallel layout.
        fused_kernels: as in :func:`rank_memory`.
        experts: whether it is a layer with experts.
    """
    model, e, n = config.model, element_size(config), _tokens(config, layout)
    t, p = layout.tp, _sequence_parts(config, layout)
    queries = model.num_attention_heads * model.head_dim
    groups = model.query_groups * model.head_dim
    rope = model.is_rotary
    mask = 1 if fused_kernels else e
    kept = _norms(config, n // p, fused_kernels) + _query_key_norms(config, n, t, fused_kernels)
    # Output of the QKV projection, of which values are a view; rotated queries and keys.
    kept += n * e * (queries + 2 * groups + (queries + groups if rope else 0)) // t
    if rope and not fused_kernels:
        length = config.data.seq_length // layout.cp
        kept += 4 * length * round(model.head_dim * model.rotary_percent) * e
    kept += _scores(config, layout, n, fused_kernels) + n * e * queries // t
    kept += _gathered_keys(config, layout, n, fused_kernels)
    kept += 2 * mask * n * model.hidden_size // p if model.hidden_dropout else 0
    if experts:
        if recomputes_experts(config):
            return kept
        return kept + expert_activations(config, layout, fused_kernels)
    return kept + feed_forward_tensors(config, fused_kernels) * n * e * model.ffn_size // t


def _query_key_norms(config: Config, n: int, t: int, fused_kernels: bool) -> int:
    """Norms of queries and keys: inputs that are no views, or unfused those in fp32; statistics."""
    model, e = config.model, element_size(config)
    if not model.qk_layernorm:
        return 0
    queries = model.num_attention_heads * model.head_dim
    groups = model.query_groups * model.head_dim
    heads = model.num_attention_heads + model.query_groups
    if fused_kernels:
        return n * (e * queries + 4 * heads) // t
    return 4 * n * (2 * queries + (1 if e == 4 else 2) * groups + heads) // t


def _norms(config: Config, n: int, fused_kernels: bool) -> int:
    """Two norms: inputs, outputs and statistics."""
    h, e = config.model.hidden_size, element_size(config)
    if config.model.normalization == "RMSNorm" and not fused_kernels:
        return 2 * n * (h * (4 + 4 + e) + 4)  # input and normalized input, both in fp32
    return 2 * n * (h * (e + e) + 8)


def gathers_keys(config: Config, fused_kernels: bool = True) -> bool:
    """Whether context-parallel ranks gather the keys and values of whole sequences.

    So does ``model/context_parallel_attention.py``; Transformer Engine's attention, which is used
    without documents, passes them around.
    """
    return config.data.reset_attention_mask or not fused_kernels


def _gathered_keys(config: Config, layout: ParallelLayout, n: int, fused_kernels: bool) -> int:
    """Keys and values of whole sequences, kept for the backward pass."""
    recomputed = config.parallel.recomputes_attention
    return 0 if recomputed else _whole_keys(config, layout, n, fused_kernels)


def _whole_keys(config: Config, layout: ParallelLayout, n: int, fused_kernels: bool) -> int:
    if layout.cp == 1 or not gathers_keys(config, fused_kernels):
        return 0
    groups = config.model.query_groups * config.model.head_dim
    return 2 * layout.cp * n * groups * element_size(config) // layout.tp


def _context_buffers(config: Config, layout: ParallelLayout, fused_kernels: bool) -> int:
    """Temporary keys and values of whole sequences in the backward pass of the attention.

    Their gradients, which replace activations that are freed by then; with recomputation those of
    one chunk as well; selective recomputation also gathers and reorders keys and values again. The
    numbers are those measured in ``tests/estimate/test_memory.py``.
    """
    full = config.parallel.recompute_granularity == "full"
    copies = 4 if config.parallel.recomputes_attention else 2 if full else 1
    return copies * _whole_keys(config, layout, _tokens(config, layout), fused_kernels)


def _scores(config: Config, layout: ParallelLayout, n: int, fused_kernels: bool) -> int:
    """Tensors that attention keeps in addition to its inputs and output."""
    model = config.model
    if config.parallel.recomputes_attention:
        return 0
    if model.attention_dropout and not fused_kernels:
        # In fp32: scores, mask and masked scores; scaled queries and keys, and values.
        heads, s = model.num_attention_heads // layout.tp, config.data.seq_length
        if layout.cp > 1:  # queries of a chunk have the keys up to its end
            s = s * (2 * layout.cp + 1) // (4 * layout.cp)
        parts = 1 if element_size(config) == 4 else 2
        scaled = model.num_attention_heads + parts * model.query_groups
        return 4 * n * (3 * heads * s + scaled * model.head_dim // layout.tp)
    return 4 * n * model.num_attention_heads // layout.tp  # log-sum-exp


def _activations(
    config: Config, layout: ParallelLayout, stage: int, fused_kernels: bool
) -> tuple[int, int]:
    """Return the bytes kept by all micro-batches in flight on a stage, and those recomputed."""
    chunks, in_flight = layout.stages[stage], layout.in_flight(stage)
    e, n, p = element_size(config), _tokens(config, layout), _sequence_parts(config, layout)
    h = config.model.hidden_size
    sizes = {
        kind: layer_activations(config, layout, fused_kernels, kind)
        for kind in set(config.model.expert_layers)
    }
    kinds = config.model.expert_layers
    kept, recomputed = max(
        _chunk_activations(
            config,
            [sizes[kind] for kind in kinds[c.first_layer : c.first_layer + c.layers]],
            n * h * e // p,
        )
        for c in chunks
    )
    total = in_flight * (kept + _dense_mask(config, fused_kernels))
    if any(chunk.output for chunk in chunks):
        total += _norms(config, n // p, fused_kernels) // 2
    if any(chunk.embedding for chunk in chunks) and config.model.hidden_dropout:
        total += n * h * (1 if fused_kernels else e) // p * in_flight
    return total, recomputed


def _chunk_activations(config: Config, layers: list[int], inputs: int) -> tuple[int, int]:
    """Return the bytes that the layers of a chunk keep per micro-batch, and those recomputed.

    Args:
        config: the run's configuration.
        layers: bytes that each layer keeps without recomputation.
        inputs: bytes of the input of a recomputed unit.
    """
    parallel = config.parallel
    if parallel.recompute_granularity != "full" or not layers:
        return sum(layers), 0
    unit = min(parallel.recompute_num_layers or 1, len(layers))
    if parallel.recompute_method == "block":
        others = sum(layers[unit:])
        # By then the backward pass of the layers without recomputation is done.
        return unit * inputs + others, max(0, max(layers[:unit]) - others)
    units = [sum(layers[i : i + unit]) for i in range(0, len(layers), unit)]
    return len(units) * inputs, max(units)


def _dense_mask(config: Config, fused_kernels: bool) -> int:
    """Mask that all layers share where attention has no kernel for documents' boundaries.

    It is of whole sequences on every context-parallel rank (``model/attention.py``).
    """
    e = element_size(config)
    has_kernel = fused_kernels and e == 2 and config.model.attention_dropout == 0.0
    if has_kernel or not config.data.reset_attention_mask:
        return 0
    return config.training.micro_batch_size * config.data.seq_length**2 * e


def _logits(config: Config, layout: ParallelLayout) -> int:
    """Logits, or their gradient, in the dtype of the activations."""
    return _tokens(config, layout) * config.padded_vocab_size // layout.tp * element_size(config)


def _loss_chunk(config: Config, layout: ParallelLayout, gpu: bool) -> int:
    """Softmax of a chunk of tokens in fp32."""
    vocabulary = config.padded_vocab_size // layout.tp
    return 4 * vocabulary * loss_chunk_tokens(_tokens(config, layout), vocabulary, gpu)


def _output_buffers(config: Config, layout: ParallelLayout) -> int:
    """Weight gradient of the output layer before it is accumulated, and its gathered input."""
    n, e, h = _tokens(config, layout), element_size(config), config.model.hidden_size
    return config.padded_vocab_size // layout.tp * h * e + n * h * e


def _layer_buffers(config: Config, layout: ParallelLayout, stage: int, fused_kernels: bool) -> int:
    """Temporary tensors of a layer's backward pass, the largest of the kinds of layers.

    The gradients of its output and of its widest activation; with tensor parallelism the gathered
    input and its gradient, before and during the reduction; with pipeline parallelism the received
    and the sent tensor.
    """
    h, t, p = config.model.hidden_size, layout.tp, _sequence_parts(config, layout)
    chunks = layout.stages[stage]
    has_output = any(chunk.output for chunk in chunks)
    whole, parts = 3 if t > 1 else 0, 3 if layout.pp > 1 and not has_output else 1
    experts, e = count_expert_layers(config, chunks), element_size(config)
    dense = sum(chunk.layers for chunk in chunks) > experts or not experts
    shared = config.model.moe_shared_expert_intermediate_size or 0
    wide = max(config.model.ffn_size if dense else 0, shared if experts else 0)
    width = parts * h // p + whole * h + wide // t
    found = _tokens(config, layout) * e * width
    if not experts:
        return found
    buffers = expert_buffers(config, layout, parts)
    if recomputes_experts(config):
        buffers += expert_activations(config, layout, fused_kernels)
    return max(found, buffers)


def _tokens(config: Config, layout: ParallelLayout) -> int:
    return config.training.micro_batch_size * config.data.seq_length // layout.cp


def _sequence_parts(config: Config, layout: ParallelLayout) -> int:
    return layout.tp if config.parallel.sequence_parallel else 1
