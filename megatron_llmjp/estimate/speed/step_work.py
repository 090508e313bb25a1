"""Floating-point operations and memory traffic of a rank's micro-batch, by kind, from shapes alone.

A kernel is described by its FLOPs and the bytes that it reads from and writes to GPU memory;
``step_time.py`` divides both by what the GPU achieves. In the formulas, n is the number of tokens
of a micro-batch on one rank, e the bytes of an activation and t the tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_llmjp.config.pipeline_layout import ModelChunk
from megatron_llmjp.config.schema import Config
from megatron_llmjp.estimate.experts import (
    ExpertLoad,
    count_expert_layers,
    count_recomputed_experts,
    expert_load,
)
from megatron_llmjp.estimate.flops import element_size
from megatron_llmjp.estimate.layout import ParallelLayout, recomputed_layers

BACKWARD_FLASH_PRODUCTS = 5
"""Matrix products of the backward pass of FlashAttention, which recomputes the scores, where the
forward pass has two (Dao, 2023, arXiv:2307.08691, section 4.1)."""
UNFUSED_SCORE_BYTES = (13, 19)
"""Bytes per score, forward and backward, of Megatron-LM's attention without FlashAttention, with a
fused softmax and scores in half precision. Forward: written by the first product (2), read and
written by softmax (4) and dropout (4, and a mask of 1), read by the second product (2). Backward:
read for the gradient of the values (2), written by that of the probabilities (2), read and written
by dropout (5) and softmax (6), read for the gradients of queries and keys (4)."""
ROUTER_BYTES = 45
"""Bytes per token and expert of megatron-core's router in fp32, counted for the forward pass and
assumed for the backward pass: logits (4), their read for the z-loss (4) and the choice (4), softmax
of the load balancing loss (8), probabilities of the chosen ones (8) and routing map (2), transposed
(10), and read for the permutation (5)."""
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
    expert_products: PassWork = PassWork()
    """Products of experts, each with its own matrices."""
    permutation: PassWork = PassWork()
    """Routing, and tokens in the order of their experts and back."""


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
    expert_products: Work = Work()
    permutation: Work = Work()
    recomputed_expert_products: Work = Work()
    recomputed_permutation: Work = Work()


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


def layer_work(
    config: Config, layout: ParallelLayout, software: Software, experts: bool = False
) -> LayerWork:
    """Compute the work of one transformer layer on one rank per micro-batch.

    The feed-forward layer of a layer with experts is that of its shared experts.
    """
    model, e, t = config.model, element_size(config), layout.tp
    n = micro_batch_tokens(config, layout)
    queries = model.num_attention_heads * model.head_dim / t
    groups = 2 * model.query_groups * model.head_dim / t
    load = expert_load(config, layout) if experts else None
    shared = model.moe_shared_expert_intermediate_size or 0
    wide = (model.ffn_size if load is None else shared) / t
    h, g = model.hidden_size, software.gradient_bytes
    halves = 2 if model.activation_function == "swiglu" else 1
    products = linear(n, h, queries + groups, e, g) + linear(n, queries, h, e, g)
    if wide:
        products = products + linear(n, h, halves * wide, e, g) + linear(n, wide, h, e, g)
    attention = _attention(config, layout, software)
    if load is None:
        element_wise = _element_wise(config, layout, n, wide)
        return LayerWork(products, attention, element_wise)
    products += linear(load.tokens, h, model.num_moe_experts or 0, e, g)
    rows = load.rows / load.local_experts
    one = linear(rows, h, halves * load.width, e, g) + linear(rows, load.width, h, e, g)
    return LayerWork(
        products,
        attention,
        _element_wise(config, layout, n, wide + load.rows * load.width / n),
        one * load.local_experts,
        _permutation(config, load),
    )


def _permutation(config: Config, load: ExpertLoad) -> PassWork:
    """Count the bytes that routing and reordering tokens reads and writes in each pass.

    Copies of tokens are gathered (2) and added (3) at one end, and reordered by expert twice (4),
    if a rank has several. Bytes of a router per token and expert: :data:`ROUTER_BYTES`.
    """
    orders = 4 if load.local_experts > 1 else 0
    elements = (5 * load.sent + orders * load.rows) * config.model.hidden_size
    scores = load.tokens * (config.model.num_moe_experts or 0) * ROUTER_BYTES
    one = Work(0.0, elements * element_size(config) + scores)
    return PassWork(one, one)


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


def _element_wise(config: Config, layout: ParallelLayout, n: int, activated: float) -> PassWork:
    """Count the bytes of element-wise kernels.

    Per element and layer, forward: two norms read and write (4), two residual additions read two
    tensors and write one (6); backward: two norms read two tensors and write one (6), two
    additions of gradients (6). Dropout has a mask of one byte, read and written once. The
    activation function has ``activated`` elements per token.
    """
    model, e, t = config.model, element_size(config), layout.tp
    p = t if config.parallel.sequence_parallel else 1
    mask = 2 if model.hidden_dropout else 0
    gated = model.activation_function == "swiglu"
    activation = (3, 5) if gated else (2, 3)
    rotated = (model.num_attention_heads + model.query_groups) * model.head_dim
    rotary = 2 * e * rotated / t if model.is_rotary else 0.0
    forward = (10 * e + mask) * model.hidden_size / p + activation[0] * e * activated
    backward = (12 * e + mask) * model.hidden_size / p + activation[1] * e * activated
    return PassWork(Work(0.0, n * (forward + rotary)), Work(0.0, n * (backward + rotary)))


def stage_work(
    config: Config, layout: ParallelLayout, software: Software, chunks: tuple[ModelChunk, ...]
) -> StageWork:
    """Compute the work of one rank of the stage with these chunks, per micro-batch."""
    layers, full = sum(chunk.layers for chunk in chunks), recomputed_layers(config, chunks)
    experts = count_expert_layers(config, chunks)
    full_experts = count_recomputed_experts(config, chunks)
    found = StageWork(
        *(Work(),) * 6,
        output_products=_output_products(config, layout, software, chunks),
        output_element_wise=_output_element_wise(config, layout, software, chunks),
    )
    if layers > experts or not experts:
        dense = layer_work(config, layout, software)
        found = _add_layers(config, found, dense, layers - experts, full - full_experts)
    if experts:
        layer = layer_work(config, layout, software, experts=True)
        found = _add_layers(config, found, layer, experts, full_experts)
    return found


def _add_layers(
    config: Config, stage: StageWork, layer: LayerWork, layers: int, full: int
) -> StageWork:
    """Add layers of one kind to the work of a stage; ``full`` of them are recomputed as a whole."""
    attention = layers if config.parallel.recomputes_attention else full
    return replace(
        stage,
        products=stage.products + layer.products.total * layers,
        attention=stage.attention + layer.attention.total * layers,
        element_wise=stage.element_wise + layer.element_wise.total * layers,
        expert_products=layer.expert_products.total * layers,
        permutation=layer.permutation.total * layers,
        recomputed_products=stage.recomputed_products + layer.products.forward * full,
        recomputed_attention=stage.recomputed_attention + layer.attention.forward * attention,
        recomputed_element_wise=stage.recomputed_element_wise + layer.element_wise.forward * full,
        recomputed_expert_products=layer.expert_products.forward * full,
        recomputed_permutation=layer.permutation.forward * full,
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
