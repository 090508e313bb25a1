"""Memory of a rank by kind, worked out from the configuration, in bytes.

What a layer keeps for its backward pass was read off autograd's saved tensors, operation by
operation, for the kernels that run on a CPU and those that run on a GPU; the tests compare the sum
with what torch's profiler measures. n is the number of tokens of a micro-batch on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.layout import Chunk, Layout
from megatron_llmjp.estimate.parameters import norm_parameters


@dataclass(frozen=True)
class Kernels:
    """What of the implementation decides how much is kept."""

    fused: bool
    """Norms, activations, rotation and dropout in one kernel each, attention without scores."""


GPU = Kernels(fused=True)
CPU = Kernels(fused=False)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, of all micro-batches in flight."""
    logits: int
    """The softmax over the vocabulary, with its gradient's buffers."""
    buffers: int
    """Gathered inputs and gradients of one layer while they are computed."""

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(getattr(self, field.name) for field in fields(self))


def element_size(config: Config) -> int:
    """Bytes of an activation."""
    return 2 if config.training.bf16 or config.training.fp16 else 4


def rank_parameters(config: Config, layout: Layout, chunks: Sequence[Chunk]) -> int:
    """Parameters that one rank of a stage holds, tied copies included."""
    model, t = config.model, layout.tp
    h, words = model.hidden_size, config.rows // t * model.hidden_size
    tied = not model.untie_embeddings_and_output_weights
    total = sum(chunk.layers for chunk in chunks) * layer_parameters(config, t)
    for chunk in chunks:
        if chunk.embedding:
            total += words
            if model.position_embedding_type == "learned_absolute":
                total += config.positions * h
        if chunk.output:
            total += norm_parameters(model)
            total += 0 if tied and layout.pp == 1 else words
    return total


def layer_parameters(config: Config, t: int) -> int:
    """Parameters of one layer on one of ``t`` tensor-parallel ranks."""
    model = config.model
    h, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    projected = queries + 2 * model.query_groups * model.head_dim
    wide = model.ffn_size * (2 if model.activation_function == "swiglu" else 1)
    total = 2 * norm_parameters(model) + h * (projected + queries + wide + model.ffn_size) // t
    if model.add_bias_linear or model.add_qkv_bias:
        total += projected // t
    return total + (wide // t + 2 * h if model.add_bias_linear else 0)


def rank_memory(config: Config, layout: Layout, stage: int, kernels: Kernels = GPU) -> Memory:
    """Memory of a rank of pipeline stage ``stage`` at its fullest."""
    chunks = layout.stages[stage]
    parameters, e = rank_parameters(config, layout, chunks), element_size(config)
    main = 4 if e == 2 else 0
    states = (
        main
        + {"adam": 8, "sgd": 4 if config.optimizer.sgd_momentum else 0}[config.optimizer.optimizer]
    )
    shards = layout.dp * layout.cp if config.parallel.use_distributed_optimizer else 1
    kept, again = _activations(config, layout, stage, kernels)
    has_output = any(chunk.output for chunk in chunks)
    logits, output = (_logits(config, layout), _output_buffers(config, layout))
    if not has_output:
        logits = output = 0
    # Of the two the larger: the backward pass of the output layer, and that of a layer behind it,
    # for which some is recomputed and the softmax is gone.
    more = max(0, again + _layer_buffers(config, layout, has_output) - logits - output)
    recomputed = min(more, again)
    return Memory(
        weights=parameters * e,
        gradients=parameters * 4,
        optimizer=parameters * states // shards,
        activations=kept + recomputed,
        logits=logits,
        buffers=output + more - recomputed,
    )


def layer_activations(config: Config, layout: Layout, kernels: Kernels) -> int:
    """Bytes that one layer keeps of one micro-batch, without recomputation."""
    model, e, n = config.model, element_size(config), _tokens(config, layout)
    t, p = layout.tp, _sequence_parts(config, layout)
    queries = model.num_attention_heads * model.head_dim
    groups = model.query_groups * model.head_dim
    rope = model.is_rotary
    mask = 1 if kernels.fused else e
    kept = _norms(config, n // p, kernels)
    # The input of the projection, from which values are a view; rotated queries and keys.
    kept += n * e * (queries + 2 * groups + (queries + groups if rope else 0)) // t
    if rope and not kernels.fused:
        kept += 4 * config.data.seq_length * round(model.head_dim * model.rotary_percent) * e
    kept += _scores(config, layout, n, kernels) + n * e * queries // t
    kept += 2 * mask * n * model.hidden_size // p if model.hidden_dropout else 0
    gated = 3 if kernels.fused else 5  # both halves and their product; also the parts of it
    widths = gated if model.activation_function == "swiglu" else 2
    return kept + widths * n * e * model.ffn_size // t


def _norms(config: Config, n: int, kernels: Kernels) -> int:
    """Two norms: their inputs, outputs and statistics."""
    h, e = config.model.hidden_size, element_size(config)
    if config.model.normalization == "RMSNorm" and not kernels.fused:
        return 2 * n * (h * (4 + 4 + e) + 4)  # input and normalised input, both in fp32
    return 2 * n * (h * (e + e) + 8)


def _scores(config: Config, layout: Layout, n: int, kernels: Kernels) -> int:
    """What attention keeps beside its inputs and output."""
    model = config.model
    if config.parallel.recompute_granularity == "selective":
        return 0
    if model.attention_dropout and not kernels.fused:
        # In fp32: scores, mask and scores under the mask; scaled queries and keys, and values.
        heads, s = model.num_attention_heads // layout.tp, config.data.seq_length
        parts = 1 if element_size(config) == 4 else 2
        scaled = model.num_attention_heads + parts * model.query_groups
        return 4 * n * (3 * heads * s + scaled * model.head_dim // layout.tp)
    return 4 * n * model.num_attention_heads // layout.tp  # the logarithms of the sums


def _activations(config: Config, layout: Layout, stage: int, kernels: Kernels) -> tuple[int, int]:
    """Bytes kept by all micro-batches in flight on a stage; and those of what is recomputed."""
    chunks, flights = layout.stages[stage], layout.in_flight(stage)
    e, n, p = element_size(config), _tokens(config, layout), _sequence_parts(config, layout)
    h, parallel = config.model.hidden_size, config.parallel
    whole = layer_activations(config, layout, kernels)
    layers = max(chunk.layers for chunk in chunks)
    kept, again = layers * whole, 0
    if parallel.recompute_granularity == "full":
        unit = min(parallel.recompute_num_layers or 1, layers)
        if parallel.recompute_method == "block":
            kept = unit * n * h * e // p + (layers - unit) * whole
            # The layers that are kept whole are done with by then.
            again = max(0, whole - (layers - unit) * whole)
        else:
            kept = -(-layers // unit) * n * h * e // p
            again = unit * whole
    total = flights * kept
    if any(chunk.output for chunk in chunks):
        total += _norms(config, n // p, kernels) // 2
    if any(chunk.embedding for chunk in chunks) and config.model.hidden_dropout:
        total += n * h * (1 if kernels.fused else e) // p * flights
    return total, again


def _logits(config: Config, layout: Layout) -> int:
    """The softmax in fp32, and the logits or their gradient in the type of the activations."""
    n, e = _tokens(config, layout), element_size(config)
    return n * config.rows // layout.tp * (4 + (e if e < 4 else 0))


def _output_buffers(config: Config, layout: Layout) -> int:
    """The output layer's weight gradient before it is added up, and its gathered input."""
    n, e, h = _tokens(config, layout), element_size(config), config.model.hidden_size
    return config.rows // layout.tp * h * e + n * h * e


def _layer_buffers(config: Config, layout: Layout, has_output: bool) -> int:
    """What a layer's backward pass needs beside what was kept for it.

    The gradients of its output and of its widest activation; over tensor-parallel ranks its
    gathered input, and that one's gradient before and while it is reduced; over stages what was
    received and what is being sent.
    """
    h, t, p = config.model.hidden_size, layout.tp, _sequence_parts(config, layout)
    whole, parts = 3 if t > 1 else 0, 3 if layout.pp > 1 and not has_output else 1
    width = parts * h // p + whole * h + config.model.ffn_size // t
    return _tokens(config, layout) * element_size(config) * width


def _tokens(config: Config, layout: Layout) -> int:
    return config.training.micro_batch_size * config.data.seq_length // layout.cp


def _sequence_parts(config: Config, layout: Layout) -> int:
    return layout.tp if config.parallel.sequence_parallel else 1
