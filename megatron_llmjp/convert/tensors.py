"""Canonical tensors of a model: names, shapes and all layouts of the checkpoint formats.

Canonical tensors have the names of megatron-core's GPTModel with global layer numbers and no
tensor parallelism, in megatron-core's layout (megatron/core/transformer/attention.py and mlp.py):

- ``linear_qkv`` rows are grouped, ``[groups, heads per group + 2, head_dim]``: the queries of a
  group, its key, its value;
- ``linear_fc1`` of SwiGLU contains all gate rows, then all up rows: ``[2 x ffn, h]``;
- each expert has tensors of its own, ``mlp.experts.local_experts.E.linear_fc1.weight``;
- matrices are ``[out, in]``; rotary position embeddings rotate halves, as in Hugging Face.

A layout is a function from a canonical tensor to the parts that are stored in files, each a *view*
of the tensor. Reading copies files into the views, writing copies the views into files: each layout
is defined once for both directions. Applied to a :class:`StridedView` instead of a tensor, it gives
the places of the parts, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.strided_view import Shape, StridedView

if TYPE_CHECKING:
    import torch

    TensorView = torch.Tensor | StridedView

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm"
OUTPUT_LAYER = "output_layer.weight"
LAYER = "decoder.layers.{i}."
ROUTER = "mlp.router.weight"
EXPERT_BIAS = "mlp.router.expert_bias"
EXPERT = "mlp.experts.local_experts.{e}."
"""Prefix of the tensors of an expert in its layer."""

VOCABULARY = frozenset({WORD_EMBEDDINGS, OUTPUT_LAYER})
"""Tensors whose first dimension is the padded vocabulary size."""


class Part(NamedTuple):
    """A stored part of a canonical tensor: a view of the tensor, and the shape in the file."""

    view: Any
    """A ``torch.Tensor``, or a :class:`StridedView`, as the layout was given."""
    shape: Shape


Layout = Callable[[Any], list[Part]]
"""Function of a tensor or a :class:`StridedView`."""

ParallelSplit = Literal["replicated", "rows", "columns", "gate_up"]
"""How tensor parallelism splits a tensor."""


def tensor_shapes(model: ModelConfig, padded_vocab_size: int) -> dict[str, Shape]:
    """Return name and shape of every tensor of a model, in the order of the forward pass.

    Args:
        model: the architecture; ``max_position_embeddings`` is required for learned position
            embeddings.
        padded_vocab_size: first dimension of the embedding ``[padded_vocab_size, h]``.
    """
    h = model.hidden_size
    found: dict[str, Shape] = {WORD_EMBEDDINGS: (padded_vocab_size, h)}
    if model.position_embedding_type == "learned_absolute":
        found[POSITION_EMBEDDINGS] = (_max_positions(model), h)
    attention, dense = _attention_shapes(model), _feed_forward_shapes(model)
    experts = expert_shapes(model) if model.has_experts else {}
    for i, has_experts in enumerate(model.expert_layers):
        prefix = LAYER.format(i=i)
        block = attention | (experts if has_experts else dense)
        found |= {prefix + name: shape for name, shape in block.items()}
    found |= {f"{FINAL_NORM}.{kind}": (h,) for kind in norm_parameters(model)}
    if model.untie_embeddings_and_output_weights:
        found[OUTPUT_LAYER] = (padded_vocab_size, h)
    return found


def _max_positions(model: ModelConfig) -> int:
    if model.max_position_embeddings is None:
        raise ValueError("max_position_embeddings is not set")
    return model.max_position_embeddings


def norm_parameters(model: ModelConfig) -> tuple[str, ...]:
    """Return the parameters of a norm; RMSNorm has no bias."""
    return ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)


def _attention_shapes(model: ModelConfig) -> dict[str, Shape]:
    h = model.hidden_size
    heads = model.num_attention_heads * model.head_dim
    qkv = heads + 2 * model.query_groups * model.head_dim
    norms: tuple[str, ...] = norm_parameters(model)
    biases = model.add_bias_linear
    block: dict[str, Shape] = {f"input_layernorm.{kind}": (h,) for kind in norms}
    block["self_attention.linear_qkv.weight"] = (qkv, h)
    if biases or model.add_qkv_bias:
        block["self_attention.linear_qkv.bias"] = (qkv,)
    if model.qk_layernorm:
        for part in ("q_layernorm", "k_layernorm"):
            block |= {f"self_attention.{part}.{kind}": (model.head_dim,) for kind in norms}
    block["self_attention.linear_proj.weight"] = (h, heads)
    if biases:
        block["self_attention.linear_proj.bias"] = (h,)
    return block | {f"pre_mlp_layernorm.{kind}": (h,) for kind in norms}


def _feed_forward_shapes(model: ModelConfig) -> dict[str, Shape]:
    h, ffn = model.hidden_size, model.ffn_size
    fc1 = _input_rows(model, ffn)
    block: dict[str, Shape] = {"mlp.linear_fc1.weight": (fc1, h)}
    if model.add_bias_linear:
        block["mlp.linear_fc1.bias"] = (fc1,)
    block["mlp.linear_fc2.weight"] = (h, ffn)
    if model.add_bias_linear:
        block["mlp.linear_fc2.bias"] = (h,)
    return block


def _input_rows(model: ModelConfig, size: int) -> int:
    return 2 * size if model.activation_function == "swiglu" else size


def expert_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Return name, relative to its layer, and shape of every tensor of a layer's experts."""
    h, size, number = model.hidden_size, model.expert_ffn_size, model.num_moe_experts or 0
    block: dict[str, Shape] = {ROUTER: (number, h)}
    if model.moe_router_enable_expert_bias:
        block[EXPERT_BIAS] = (number,)
    for e in range(number):
        prefix = EXPERT.format(e=e)
        block[f"{prefix}linear_fc1.weight"] = (_input_rows(model, size), h)
        block[f"{prefix}linear_fc2.weight"] = (h, size)
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None:
        block["mlp.shared_experts.linear_fc1.weight"] = (_input_rows(model, shared), h)
        block["mlp.shared_experts.linear_fc2.weight"] = (h, shared)
        if model.moe_shared_expert_gate:
            block["mlp.shared_experts.gate_weight"] = (1, h)
    return block


def is_linear(name: str) -> bool:
    """Return whether a tensor is the weight of a linear layer of a transformer block."""
    return ".linear_" in name and name.endswith(".weight")


def parallel_split(name: str, model: ModelConfig) -> ParallelSplit:
    """Return how tensor parallelism splits the tensor of this name."""
    if name in VOCABULARY or ".linear_qkv." in name:
        return "rows"
    if ".linear_fc1." in name:
        return "gate_up" if model.activation_function == "swiglu" else "rows"
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return "columns"
    return "replicated"


def rank_layout(name: str, model: ModelConfig, size: int) -> Layout:
    """Return the layout of a tensor over ``size`` tensor-parallel ranks.

    It has one part per rank, or a single part for a replicated tensor.
    """
    split = parallel_split(name, model)
    if size == 1 or split == "replicated":
        return whole
    functions = {"rows": split_rows, "columns": split_columns, "gate_up": gate_up_rows}
    return partial(functions[split], size=size)


def whole(tensor: TensorView) -> list[Part]:
    """Return the whole tensor as a single part."""
    return [Part(tensor, tuple(tensor.shape))]


def transposed(tensor: TensorView) -> list[Part]:
    """Transpose ``[out, in]`` to ``[in, out]``, the layout of GPT-2's Conv1D."""
    view = tensor.t()
    return [Part(view, tuple(view.shape))]


def split_rows(tensor: TensorView, size: int) -> list[Part]:
    """Split the first dimension into ``size`` equal parts."""
    return [Part(view, tuple(view.shape)) for view in tensor.chunk(size)]


def split_columns(tensor: TensorView, size: int) -> list[Part]:
    """Split the second dimension into ``size`` equal parts."""
    return [Part(view, tuple(view.shape)) for view in tensor.chunk(size, dim=1)]


def gate_up(tensor: TensorView) -> list[Part]:
    """Split ``[2 x ffn, ...]`` into gate and up, each ``[ffn, ...]``."""
    return split_rows(tensor, 2)


def gate_up_rows(tensor: TensorView, size: int) -> list[Part]:
    """Split ``[2 x ffn, ...]`` into ``[gate_t; up_t]`` of each tensor-parallel rank ``t``.

    Concatenating the ranks' rows instead gives a model that loads and computes wrong outputs.
    """
    rest = tensor.shape[1:]
    split = tensor.view(2, size, -1, *rest)
    shape = (tensor.shape[0] // size, *rest)
    return [Part(split[:, rank], shape) for rank in range(size)]


def query_key_value(tensor: TensorView, groups: int, head_dim: int) -> list[Part]:
    """Split grouped ``linear_qkv`` rows into queries, keys and values, each head by head.

    ``[(n + 2 g) d, ...]`` becomes ``[n d, ...]``, ``[g d, ...]`` and ``[g d, ...]``.
    """
    rest = tensor.shape[1:]
    grouped = tensor.view(groups, -1, head_dim, *rest)
    views = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
    return [Part(view, (view.numel() // max(1, math.prod(rest)), *rest)) for view in views]


def query_key_value_conv1d(tensor: TensorView, heads: int) -> list[Part]:
    """Rearrange per-head ``linear_qkv`` to GPT-2's ``c_attn``: columns q | k | v, head by head.

    A weight ``[3 n d, h]`` becomes ``[h, 3 n d]`` (Conv1D is transposed); a bias ``[3 n d]`` keeps
    its shape.
    """
    per_head = tensor.view(heads, 3, -1, *tensor.shape[1:])
    if tensor.dim() == 1:
        return [Part(per_head.permute(1, 0, 2), (tensor.shape[0],))]
    return [Part(per_head.permute(3, 1, 0, 2), (tensor.shape[1], tensor.shape[0]))]


def rectangular_parts(tensor: TensorView, places: Sequence[tuple[Shape, Shape]]) -> list[Part]:
    """Return rectangular parts of a tensor, each given by its offsets and its sizes."""
    parts = []
    for offsets, sizes in places:
        view = tensor
        for dim, (offset, length) in enumerate(zip(offsets, sizes, strict=True)):
            view = view.narrow(dim, offset, length)
        parts.append(Part(view, sizes))
    return parts


def part_shapes(layout: Layout, shape: Shape) -> list[Shape]:
    """Return the shapes of a layout's parts in the file, computed without data."""
    return [part.shape for part in layout(StridedView.of(shape))]


def resize_vocabulary(tensor: torch.Tensor, padded_vocab_size: int) -> torch.Tensor:
    """Trim or pad the first dimension; padding repeats the last row, as in Megatron-LM.

    A padding row that repeats the row of a rare token is as improbable as that token. A row of
    zeros would have logit 0, which is not improbable in a trained model.
    """
    import torch

    missing = padded_vocab_size - tensor.shape[0]
    if missing <= 0:
        return tensor[:padded_vocab_size]
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
