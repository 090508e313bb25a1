"""Replacement of how the distributed optimizer's state is divided for checkpoints.

What: ``sharded_param_state_fully_reshardable`` and ``load_parameter_state_from_fully_reshardable``
of one ``DistributedOptimizer``.

Why: megatron-core gathers the fp32 state of all local parameters on every data-parallel rank,
bucket by bucket through the GPU and pageable memory, and only rank 0 writes it. On load, every rank
reads all of it. It also shifts the state behind a bucket that is padded, and fails before the first
step, when there are no moments. Here each rank writes and reads the part that it owns, in place.
The keys and shapes of the tensors are the same, so checkpoints of both load in both and in any
layout; only the chunks differ.

An optimizer's shard is a range of a flattened parameter. A range of a tensor ``[rows, columns]``
consists of up to three rectangles: the end of a row, whole rows, the beginning of a row. They are
chunks with irregular offsets, which megatron-core and torch store without a grid. megatron-core's
own formats for ranges do not suffice: ``fully_sharded_model_space`` cannot be written any more, and
``dp_reshardable`` loads only with the same tensor and pipeline parallelism.

Remove when ``fully_reshardable`` is written by all ranks without communication. Not the case in
megatron-core 0.16.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
Shape = tuple[int, ...]


def shard_by_rank(optimizer: Any) -> None:
    """Make a ``DistributedOptimizer`` save and load its own part of the state."""

    def sharded(model: Any, is_loading: bool = False, metadata: Any = None) -> dict[int, Any]:
        _create_missing_moments(optimizer.optimizer)
        return dict(enumerate(_sharded_states(optimizer, model)))

    optimizer.sharded_param_state_fully_reshardable = sharded
    # The targets of a load are the optimizer's own tensors.
    optimizer.load_parameter_state_from_fully_reshardable = lambda loaded: None


@dataclass(frozen=True)
class Rectangle:
    """A part of a contiguous tensor that is a range of its elements in memory."""

    start: int
    """First element in memory."""
    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def rectangles(shape: Shape, start: int, end: int) -> Iterator[Rectangle]:
    """Divide the elements ``[start, end)`` of a contiguous tensor into rectangles, in order."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield Rectangle(start, (start,) * len(shape), (end - start,) * len(shape))
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), end // inner
    if first > last:  # within one row
        yield from _within_row(shape, start, end)
        return
    yield from _within_row(shape, start, first * inner)
    if first < last:
        rest = (0,) * (len(shape) - 1)
        yield Rectangle(first * inner, (first, *rest), (last - first, *shape[1:]))
    yield from _within_row(shape, last * inner, end)


def _within_row(shape: Shape, start: int, end: int) -> Iterator[Rectangle]:
    """Divide a range of elements within one index of the first dimension."""
    row, inner = start // math.prod(shape[1:]), math.prod(shape[1:])
    for part in rectangles(shape[1:], start - row * inner, end - row * inner):
        yield Rectangle(part.start + row * inner, (row, *part.offsets), (1, *part.sizes))


def _sharded_states(optimizer: Any, model: Any) -> Iterator[dict[str, dict[int, ShardedTensor]]]:
    """Yield the main weight and the moments of each parameter that this rank has a part of.

    Args:
        optimizer: a ``DistributedOptimizer``.
        model: sharded state of the model, with the parameters as data.
    """
    places = {
        id(entry.data): entry
        for entry in nested_values(model)
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
    }
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, own in bucket["param_map"].items():
                    states = optimizer._get_main_param_and_optimizer_states(parameter)
                    chunks = list(_chunks(places[id(parameter)]))
                    yield {
                        name: dict(enumerate(_pieces(name, states[name], own["param"], chunks)))
                        for name in ("param", *MOMENTS)
                    }


def _chunks(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[int, ShardedTensor]]:
    """Yield the tensors of a checkpoint that a local parameter consists of.

    Each comes with the offset of its first element in the flattened parameter: SwiGLU's parameter
    consists of two, the gate and the linear part.
    """
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    for chunk in nested_values({"": built}):
        if not chunk.data.is_contiguous():
            raise NotImplementedError(f"{chunk.key} is not a contiguous part of its parameter")
        yield chunk.data.storage_offset() - entry.data.storage_offset(), chunk


def _pieces(
    name: str, state: Tensor, own: Any, chunks: list[tuple[int, ShardedTensor]]
) -> Iterator[ShardedTensor]:
    """Yield the rectangles of one state, as views of it.

    Args:
        name: key of the state.
        state: this rank's elements, ``[own.end - own.start]``.
        own: their range in the flattened local parameter.
        chunks: see :func:`_chunks`.
    """
    for first, chunk in chunks:
        start = max(own.start - first, 0)
        end = min(own.end - first, math.prod(chunk.local_shape))
        for part in rectangles(tuple(chunk.local_shape), start, end):
            place = first + part.start - own.start
            shape = (1,) * chunk.prepend_axis_num + part.sizes
            yield replace(
                chunk,
                key=f"optimizer.state.{name}.{chunk.key}",
                data=state.detach()[place : place + part.numel].view(shape),
                dtype=state.dtype,
                local_shape=shape,
                global_offset=_offset(chunk, part),
                axis_fragmentations=None,  # irregular
                prepend_axis_num=0,
                replica_id=(*chunk.replica_id[:2], 0),  # no other data-parallel rank has it
            )


def _offset(chunk: ShardedTensor, part: Rectangle) -> Shape:
    """Return the offset of a rectangle of a chunk in the whole tensor."""
    inner = (0,) * chunk.prepend_axis_num + part.offsets
    return tuple(a + b for a, b in zip(chunk.global_offset, inner, strict=True))


def _create_missing_moments(adam: Any) -> None:
    """Set the moments that a parameter lacks to zero, as its first step would."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            for name in MOMENTS:
                if parameter.numel() > 0 and name not in state:
                    state[name] = torch.zeros_like(parameter)
