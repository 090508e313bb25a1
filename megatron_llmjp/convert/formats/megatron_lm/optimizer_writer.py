"""Writer of AdamW's state for Megatron-LM's distributed optimizer, in ``torch_dist``.

Two formats (``distrib_optim_sharding_type``) load with any tensor and pipeline parallel size:

- ``fully_sharded_model_space``: the default of core 0.8 to 0.15, and of LLM-jp's fork. Moments and
  fp32 weights are split into a grid of fragments, as tensor parallelism splits them, and each
  fragment is flattened. The entry has the shape ``[layers, grid..., elements of a fragment]``;
  megatron-core's metadata has the shape of the tensor (``nd_flattened_tensor_reformulated_*`` in
  megatron/core/dist_checkpointing/strategies/resharding.py). SwiGLU's gate and up are separate
  fragments (``apply_swiglu_sharded_factory`` in megatron/core/transformer/mlp.py).
- ``fully_reshardable``: from core 0.15 on, with ``--dist-ckpt-optim-fully-reshardable``; the format
  of native checkpoints. Core 0.16 and newer do not load flattened fragments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter, split_into_chunks
from megatron_llmjp.convert.formats import mcore_names
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.optimizer import optimizer_state
from megatron_llmjp.convert.optimizer.optimizer_state import MAIN_WEIGHTS, PREFIX, OptimizerState
from megatron_llmjp.convert.plan import Slot, TensorWrite
from megatron_llmjp.convert.tensors import (
    VOCABULARY,
    Shape,
    parallel_split,
    rectangular_parts,
    tensor_shapes,
)

FRAGMENTS = "fully_sharded_model_space"
RESHARDABLE = "fully_reshardable"
_SHAPE = "nd_reformulated_orig_global_shape"
_STORED_KINDS = {MAIN_WEIGHTS: "fp32_param"}


def add_model_and_optimizer(
    writer: TorchDistWriter, source: SourceCheckpoint, options: ConversionOptions, rows: int
) -> tuple[dict[str, TensorWrite], dict[str, Any]]:
    """Add the weights and the optimizer's tensors to a distributed checkpoint.

    Args:
        writer: of the checkpoint.
        source: with its optimizer state opened.
        options: provide the format, tensor parallelism and ``--dtype``.
        rows: padded vocabulary size of the target.

    Returns:
        The write of every tensor, and the optimizer's part of the common state.
    """
    state = optimizer_state.read_optimizer_state(source)
    if options.optimizer_sharding == RESHARDABLE:
        writes = mcore_names.add_model_tensors(writer, source, options, rows)
        writes |= optimizer_state.add_optimizer_state(writer, source, state, options, rows)
        return writes, _common_state(state, RESHARDABLE)
    return _add_fragments(writer, source, state, options, rows), _common_state(state, FRAGMENTS)


def _common_state(state: OptimizerState, sharding: str) -> dict[str, Any]:
    common = optimizer_state.optimizer_common_state(state)
    # Parameter groups are matched by their position: those of the first rank have the embedding,
    # which has weight decay, first. Adam of Transformer Engine and Apex requires bias_correction.
    groups = [
        {**group, "bias_correction": True}
        for group in sorted(
            common["optimizer"]["param_groups"], key=lambda group: not group.get("wd_mult", 1.0)
        )
    ]
    optimizer = {
        **common["optimizer"],
        "optimizer": {"param_groups": groups},
        "param_state_sharding_type": sharding,
    }
    del optimizer["param_groups"]
    common["optimizer"] = optimizer
    if sharding == RESHARDABLE:
        common["content_metadata"] = {
            "distrib_optim_sharding_type": RESHARDABLE,
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        }
    return common


def _add_fragments(
    writer: TorchDistWriter,
    source: SourceCheckpoint,
    state: OptimizerState,
    options: ConversionOptions,
    rows: int,
) -> dict[str, TensorWrite]:
    model = source.model
    kinds = optimizer_state.state_kinds(source, state, options)
    has_main_weights = MAIN_WEIGHTS in kinds
    writes = {}
    if has_main_weights:
        writes = mcore_names.add_model_tensors(writer, source, options, rows)
    for name, shape in tensor_shapes(model, rows).items():
        pieces = list(fragment_pieces(name, model, shape, options.tensor_parallel))
        layout = partial(rectangular_parts, places=tuple(box for _, box in pieces))
        vocabulary = rows if name in VOCABULARY else None
        for kind in kinds:
            slots = [[slot] for slot in _fragment_slots(writer, kind, name, model, shape, pieces)]
            writes[f"{PREFIX}{kind}.{name}"] = TensorWrite(layout, slots, vocabulary)
        if not has_main_weights:  # fp32: the weights are written a second time, as fragments
            key, layer = mcore_names.stored_key(name)
            lead, whole = _stacked(layer, model, shape)
            copies = _fragment_slots(writer, MAIN_WEIGHTS, name, model, shape, pieces)
            both = []
            for (_, (offsets, sizes)), copy in zip(pieces, copies, strict=True):
                where, size = (*lead, *offsets), (*(1 for _ in lead), *sizes)
                both.append([writer.add_chunk(key, whole, DType.float32, where, size), copy])
            writes[name] = TensorWrite(layout, both, vocabulary)
    return writes


Piece = tuple[tuple[Shape, int], tuple[Shape, Shape]]
"""Cell of the grid, first element in its fragment; offsets and sizes in the tensor."""


def fragment_pieces(name: str, model: ModelConfig, shape: Shape, size: int) -> Iterator[Piece]:
    """Yield the pieces of a tensor's fragments, each of whole rows of its fragment.

    Args:
        name: canonical name.
        model: the architecture.
        shape: of the canonical tensor.
        size: tensor parallel size.
    """
    grid = fragment_grid(name, model, len(shape), size)
    fragment = tuple(n // g for n, g in zip(shape, grid, strict=True))
    for cell in product(*map(range, grid)):
        start = tuple(i * n for i, n in zip(cell, fragment, strict=True))
        for offsets, sizes in split_into_chunks(fragment, DType.float32):
            first = offsets[0] * math.prod(fragment[1:])
            where = tuple(a + b for a, b in zip(start, offsets, strict=True))
            yield (cell, first), (where, sizes)


def fragment_grid(name: str, model: ModelConfig, dimensions: int, size: int) -> Shape:
    """Return into how many fragments tensor parallelism divides each dimension of a tensor."""
    ones = (1,) * (dimensions - 1)
    split = parallel_split(name, model)
    if split == "columns":
        return (1, size)
    return ({"rows": size, "gate_up": 2 * size, "replicated": 1}[split], *ones)


def _fragment_slots(
    writer: TorchDistWriter,
    kind: str,
    name: str,
    model: ModelConfig,
    shape: Shape,
    pieces: list[Piece],
) -> list[Slot]:
    """Add the pieces of one kind of state; returns their slots."""
    key, layer = mcore_names.stored_key(name)
    key = f"{PREFIX}{_STORED_KINDS.get(kind, kind)}.{key}"
    lead, whole = _stacked(layer, model, shape)
    grid = tuple(1 + max(cell[i] for (cell, _), _ in pieces) for i in range(len(shape)))
    fragments = (*whole[: len(lead)], *grid)
    entry = (*fragments, math.prod(shape) // math.prod(grid))
    writer.mcore_data[key] = {_SHAPE: whole}
    ones = (1,) * len(fragments)
    return [
        writer.add_chunk(
            key, entry, DType.float32, (*lead, *cell, first), (*ones, math.prod(sizes))
        )
        for (cell, first), (_, sizes) in pieces
    ]


def _stacked(layer: int | None, model: ModelConfig, shape: Shape) -> tuple[Shape, Shape]:
    """Return the index of a layer in its stack, and the shape of the stack."""
    return ((), shape) if layer is None else ((layer,), (model.num_layers, *shape))
