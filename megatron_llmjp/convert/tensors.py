"""The canonical tensor model: names, shapes and every layout another format may use.

Canonical tensors carry the names of megatron-core's GPTModel with global layer numbers and no
tensor parallelism, in megatron-core's layout (megatron/core/transformer/attention.py and mlp.py):

- ``linear_qkv`` rows are grouped, ``[groups, heads per group + 2, head_dim]``: the queries of a
  group, its key, its value;
- ``linear_fc1`` of a SwiGLU holds all gates, then all ups: ``[2 x ffn, h]``;
- matrices are ``[out, in]``; rotary positions rotate halves, as in Hugging Face.

A layout is a function from a canonical tensor to the parts that a file holds, each a *view* of it.
Reading copies files into the views, writing copies the views into files, so that each layout is
written down once and both directions agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch

from megatron_llmjp.config.schema import ModelConfig

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm"
OUTPUT_LAYER = "output_layer.weight"
LAYER = "decoder.layers.{i}."

VOCABULARY = frozenset({WORD_EMBEDDINGS, OUTPUT_LAYER})
"""Tensors whose first dimension is the padded vocabulary."""

Shape = tuple[int, ...]


class Part(NamedTuple):
    """What a file holds of a canonical tensor: a view of it, and the shape in the file."""

    view: torch.Tensor
    shape: Shape


Layout = Callable[[torch.Tensor], list[Part]]

ParallelSplit = Literal["replicated", "rows", "columns", "gate_up"]
"""How tensor parallelism divides a tensor."""


def tensor_shapes(model: ModelConfig, rows: int) -> dict[str, Shape]:
    """Name and shape of every tensor of a model, in the order of its forward pass.

    Args:
        model: the architecture; ``max_position_embeddings`` is needed with learned positions.
        rows: rows of the embedding, ``[rows, h]``.
    """
    h = model.hidden_size
    found: dict[str, Shape] = {WORD_EMBEDDINGS: (rows, h)}
    if model.position_embedding_type == "learned_absolute":
        found[POSITION_EMBEDDINGS] = (_positions(model), h)
    block = _block_shapes(model)
    for i in range(model.num_layers):
        prefix = LAYER.format(i=i)
        found |= {prefix + name: shape for name, shape in block.items()}
    found |= {f"{FINAL_NORM}.{kind}": (h,) for kind in norm_parameters(model)}
    if model.untie_embeddings_and_output_weights:
        found[OUTPUT_LAYER] = (rows, h)
    return found


def _positions(model: ModelConfig) -> int:
    if model.max_position_embeddings is None:
        raise ValueError("max_position_embeddings is not known")
    return model.max_position_embeddings


def norm_parameters(model: ModelConfig) -> tuple[str, ...]:
    """Parameters of a norm: LayerNorm has a bias, RMSNorm has none."""
    return ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)


def _block_shapes(model: ModelConfig) -> dict[str, Shape]:
    h, ffn = model.hidden_size, model.ffn_size
    heads = model.num_attention_heads * model.head_dim
    qkv = heads + 2 * model.query_groups * model.head_dim
    fc1 = 2 * ffn if model.activation_function == "swiglu" else ffn
    norms: tuple[str, ...] = norm_parameters(model)
    biases = model.add_bias_linear
    block: dict[str, Shape] = {f"input_layernorm.{kind}": (h,) for kind in norms}
    block["self_attention.linear_qkv.weight"] = (qkv, h)
    if biases or model.add_qkv_bias:
        block["self_attention.linear_qkv.bias"] = (qkv,)
    block["self_attention.linear_proj.weight"] = (h, heads)
    if biases:
        block["self_attention.linear_proj.bias"] = (h,)
    block |= {f"pre_mlp_layernorm.{kind}": (h,) for kind in norms}
    block["mlp.linear_fc1.weight"] = (fc1, h)
    if biases:
        block["mlp.linear_fc1.bias"] = (fc1,)
    block["mlp.linear_fc2.weight"] = (h, ffn)
    if biases:
        block["mlp.linear_fc2.bias"] = (h,)
    return block


def parallel_split(name: str, model: ModelConfig) -> ParallelSplit:
    """How tensor parallelism divides the tensor of this name."""
    if name in VOCABULARY or ".linear_qkv." in name:
        return "rows"
    if ".linear_fc1." in name:
        return "gate_up" if model.activation_function == "swiglu" else "rows"
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return "columns"
    return "replicated"


def rank_layout(name: str, model: ModelConfig, size: int) -> Layout:
    """The layout of one tensor over ``size`` tensor-parallel ranks.

    It has one part per rank, or a single one for a tensor that all ranks hold whole.
    """
    split = parallel_split(name, model)
    if size == 1 or split == "replicated":
        return whole
    functions = {"rows": split_rows, "columns": split_columns, "gate_up": gate_up_rows}
    return partial(functions[split], size=size)


def whole(tensor: torch.Tensor) -> list[Part]:
    """The tensor as it is."""
    return [Part(tensor, tuple(tensor.shape))]


def transposed(tensor: torch.Tensor) -> list[Part]:
    """``[out, in]`` as GPT-2's Conv1D keeps it: ``[in, out]``."""
    view = tensor.t()
    return [Part(view, tuple(view.shape))]


def split_rows(tensor: torch.Tensor, size: int) -> list[Part]:
    """``size`` equal parts of the first dimension."""
    return [Part(view, tuple(view.shape)) for view in tensor.chunk(size)]


def split_columns(tensor: torch.Tensor, size: int) -> list[Part]:
    """``size`` equal parts of the second dimension."""
    return [Part(view, tuple(view.shape)) for view in tensor.chunk(size, dim=1)]


def gate_up(tensor: torch.Tensor) -> list[Part]:
    """``[2 x ffn, ...]`` as gate and up, each ``[ffn, ...]``."""
    return split_rows(tensor, 2)


def gate_up_rows(tensor: torch.Tensor, size: int) -> list[Part]:
    """``[2 x ffn, ...]`` as ``[gate_t; up_t]`` of each tensor-parallel rank ``t``.

    Joining the ranks' rows without this gives a model that loads and is wrong.
    """
    rest = tensor.shape[1:]
    split = tensor.view(2, size, -1, *rest)
    shape = (tensor.shape[0] // size, *rest)
    return [Part(split[:, rank], shape) for rank in range(size)]


def query_key_value(tensor: torch.Tensor, groups: int, head_dim: int) -> list[Part]:
    """Grouped ``linear_qkv`` rows as queries, keys and values, each heads-major.

    ``[(n + 2 g) d, ...]`` gives ``[n d, ...]``, ``[g d, ...]`` and ``[g d, ...]``.
    """
    rest = tensor.shape[1:]
    grouped = tensor.view(groups, -1, head_dim, *rest)
    views = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
    return [Part(view, (view.numel() // max(1, rest.numel()), *rest)) for view in views]


def query_key_value_conv1d(tensor: torch.Tensor, heads: int) -> list[Part]:
    """Per-head ``linear_qkv`` as GPT-2's ``c_attn``: columns q | k | v, each heads-major.

    A weight ``[3 n d, h]`` gives ``[h, 3 n d]`` (Conv1D is transposed), a bias ``[3 n d]`` itself
    in that order.
    """
    per_head = tensor.view(heads, 3, -1, *tensor.shape[1:])
    if tensor.dim() == 1:
        return [Part(per_head.permute(1, 0, 2), (tensor.shape[0],))]
    return [Part(per_head.permute(3, 1, 0, 2), (tensor.shape[1], tensor.shape[0]))]


def rectangular_parts(tensor: torch.Tensor, places: Sequence[tuple[Shape, Shape]]) -> list[Part]:
    """Rectangular parts of a tensor, each given by its offsets and its sizes."""
    parts = []
    for offsets, sizes in places:
        view = tensor
        for dim, (offset, length) in enumerate(zip(offsets, sizes, strict=True)):
            view = view.narrow(dim, offset, length)
        parts.append(Part(view, sizes))
    return parts


def part_shapes(layout: Layout, shape: Shape) -> list[Shape]:
    """The shapes that a layout's parts have in the file, without touching data."""
    return [part.shape for part in layout(torch.empty(shape, device="meta"))]


def resize_vocabulary(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Trim or pad the first dimension; padding repeats the last row, as Megatron-LM does.

    A row that repeats a rare token's row keeps the padding as unlikely as that token. Rows of
    zeros would have logit 0, which is far from unlikely in a trained model.
    """
    missing = count - tensor.shape[0]
    if missing <= 0:
        return tensor[:count]
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
