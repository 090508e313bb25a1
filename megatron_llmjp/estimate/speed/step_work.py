"""Floating-point operations and memory traffic of a rank's micro-batch, by kind, from shapes alone.

A kernel is described by its FLOPs and the bytes that it reads from and writes to GPU memory;
``step_time.py`` divides both by what the GPU achieves. In the formulas, n is the number of tokens
of a micro-batch on one rank, e the bytes of an activation and t the tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.pipeline_layout import ModelChunk
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.layout import ParallelLayout, recomputed_layers
from megatron_llmjp.estimate.memory import element_size

BACKWARD_FLASH_PRODUCTS = 5
"""Matrix products of the backward pass of FlashAttention, which recomputes the scores, where the
forward pass has two (Dao, 2023, arXiv:2307.08691, section 4.1)."""
UNFUSED_SCORE_BYTES = (13, 19)
"""Bytes per score, forward and backward, of Megatron-LM's attention without FlashAttention, with a
fused softmax and scores in half precision. Forward: written by the first product (2), read and
written by softmax (4) and dropout (4, and a mask of 1), read by the second product (2). Backward:
read for the gradient of the values (2), written by that of the probabilities (2), read and written
by dropout (5) and softmax (6), read for the gradients of queries and keys (4)."""
LOSS_BYTES = 52
"""Bytes per logit of Megatron-LM's ``vocab_parallel_cross_entropy``: conversion to fp32 (6),
maximum (4), subtraction (8), exponential (8), sum (4), division (8), gradient (8) and its
conversion (6)."""


@dataclass(frozen=True)
class Software:
    """Implementation of a run as far as it affects its speed; the defaults are this project's."""

    flash_attention: bool = True
    """Whether attention keeps no scores; else half-precision scores with a fused softmax."""
    gradient_bytes: int = 4
    """Bytes of an accumulated gradient element."""
    overlaps_tensor_communication: bool = False
    """Whether chunks of tensor-parallel communication run during matrix products (user buffers)."""
    overlaps_pipeline_communication: bool = True
    """Whether the interleaved schedule sends activations during computation."""
    scatters_pipeline_messages: bool = False
    """Whether tensor-parallel ranks each send a part of an activation even without sequence
    parallelism."""


@dataclass(frozen=True)
class Work:
    """Work of kernels."""

    flops: float = 0.0
    bytes: float = 0.0
    """Read from and written to GPU memory."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor)


@dataclass(frozen=True)
class PassWork:
    """Work of the forward and of the backward pass."""

    forward: Work = Work()
    backward: Work = Work()

    @property
    def total(self) -> Work:
        """Work of both passes."""
        return self.forward + self.backward

    def __add__(self, other: PassWork) -> PassWork:
        return PassWork(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> PassWork:
        return PassWork(self.forward * factor, self.backward * factor)


@dataclass(frozen=True)
class LayerWork:
    """Work of one transformer layer on one rank per micro-batch, without recomputation."""

    products: PassWork
    """Projections of attention and the feed-forward layer."""
    attention: PassWork
    """Scores and their product with the values."""
    element_wise: PassWork
    """Norms, rotary embedding, activation function, dropout and residual connections."""


@dataclass(frozen=True)
class StageWork:
    """Work of one rank of a pipeline stage per micro-batch."""

    products: Work
    attention: Work
    element_wise: Work
    recomputed_products: Work
    recomputed_attention: Work
    recomputed_element_wise: Work
    output_products: Work
    """Products of the output layer."""
    output_element_wise: Work
    """Embedding and loss."""


def matrix_product(m: float, n: float, k: float, e: int) -> Work:
    """Return the work of one product of an m x k and a k x n matrix of ``e``-byte elements."""
    return Work(2 * m * n * k, e * (m * k + k * n + m * n))


def linear(n: float, inputs: float, outputs: float, e: int, gradient_bytes: int) -> PassWork:
    """Return the work of a linear layer over n tokens: three products of the same FLOPs.

    The gradient of the weight is accumulated: its accumulator is read and written.
    """
    forward = matrix_product(n, outputs, inputs, e)
    weight = Work(forward.flops, e * n * (inputs + outputs) + 2 * gradient_bytes * inputs * outputs)
    return PassWork(forward, forward + weight)


def layer_work(config: Config, layout: ParallelLayout, software: Software) -> LayerWork:
    """Compute the work of one transformer layer on one rank per micro-batch."""
    model, e, t = config.model, element_size(config), layout.tp
    n = micro_batch_tokens(config, layout)
    queries = model.num_attention_heads * model.head_dim / t
    groups = 2 * model.query_groups * model.head_dim / t
    wide = model.ffn_size / t
    h, g = model.hidden_size, software.gradient_bytes
    halves = 2 if model.activation_function == "swiglu" else 1
    products = (
        linear(n, h, queries + groups, e, g)
        + linear(n, queries, h, e, g)
        + linear(n, h, halves * wide, e, g)
        + linear(n, wide, h, e, g)
    )
    return LayerWork(
        products, _attention(config, layout, software), _element_wise(config, layout, n)
    )


def micro_batch_tokens(config: Config, layout: ParallelLayout) -> int:
    """Return the tokens of a micro-batch on one rank."""
    return config.training.micro_batch_size * config.data.seq_length // layout.cp


def _attention(config: Config, layout: ParallelLayout, software: Software) -> PassWork:
    model, e, s = config.model, element_size(config), config.data.seq_length
    n, t = micro_batch_tokens(config, layout), layout.tp
    product = 2 * n * s * model.num_attention_heads * model.head_dim / t
    if software.flash_attention:
        inputs = n * (model.num_attention_heads + model.query_groups) * 2 * model.head_dim / t * e
        # The causal mask halves the products.
        return PassWork(
            Work(product, inputs), Work(BACKWARD_FLASH_PRODUCTS / 2 * product, 2 * inputs)
        )
    scores = n * s * model.num_attention_heads / t
    forward, backward = UNFUSED_SCORE_BYTES
    return PassWork(Work(2 * product, forward * scores), Work(4 * product, backward * scores))


def _element_wise(config: Config, layout: ParallelLayout, n: int) -> PassWork:
    """Count the bytes of element-wise kernels.

    Per element and layer, forward: two norms read and write (4), two residual additions read two
    tensors and write one (6); backward: two norms read two tensors and write one (6), two
    additions of gradients (6). Dropout has a mask of one byte, read and written once.
    """
    model, e, t = config.model, element_size(config), layout.tp
    p = t if config.parallel.sequence_parallel else 1
    mask = 2 if model.hidden_dropout else 0
    gated = model.activation_function == "swiglu"
    activation = (3, 5) if gated else (2, 3)
    rotated = (model.num_attention_heads + model.query_groups) * model.head_dim
    rotary = 2 * e * rotated / t if model.is_rotary else 0.0
    forward = (10 * e + mask) * model.hidden_size / p + activation[0] * e * model.ffn_size / t
    backward = (12 * e + mask) * model.hidden_size / p + activation[1] * e * model.ffn_size / t
    return PassWork(Work(0.0, n * (forward + rotary)), Work(0.0, n * (backward + rotary)))


def stage_work(
    config: Config, layout: ParallelLayout, software: Software, chunks: tuple[ModelChunk, ...]
) -> StageWork:
    """Compute the work of one rank of the stage with these chunks, per micro-batch."""
    layer = layer_work(config, layout, software)
    layers = sum(chunk.layers for chunk in chunks)
    full = recomputed_layers(config, chunks)
    attention = layers if config.parallel.recompute_granularity == "selective" else full
    return StageWork(
        products=layer.products.total * layers,
        attention=layer.attention.total * layers,
        element_wise=layer.element_wise.total * layers,
        recomputed_products=layer.products.forward * full,
        recomputed_attention=layer.attention.forward * attention,
        recomputed_element_wise=layer.element_wise.forward * full,
        output_products=_output_products(config, layout, software, chunks),
        output_element_wise=_output_element_wise(config, layout, software, chunks),
    )


def _output_products(
    config: Config, layout: ParallelLayout, software: Software, chunks: tuple[ModelChunk, ...]
) -> Work:
    if not any(chunk.output for chunk in chunks):
        return Work()
    n, rows = micro_batch_tokens(config, layout), config.padded_vocab_size / layout.tp
    e, h = element_size(config), config.model.hidden_size
    return linear(n, h, rows, e, software.gradient_bytes).total


def _output_element_wise(
    config: Config, layout: ParallelLayout, software: Software, chunks: tuple[ModelChunk, ...]
) -> Work:
    """Count the bytes of the loss and of the embedding.

    The lookup reads and writes a row per token, and its gradient is read and added to a row.
    """
    n, e = micro_batch_tokens(config, layout), element_size(config)
    size = 0.0
    if any(chunk.output for chunk in chunks):
        size += n * config.padded_vocab_size / layout.tp * LOSS_BYTES
    if any(chunk.embedding for chunk in chunks):
        size += n * config.model.hidden_size * (3 * e + 2 * software.gradient_bytes)
    return Work(0.0, size)
