"""Reader of two formats of optimizer state of Megatron-LM's distributed optimizer.

``fully_sharded_model_space`` (core 0.12, and LLM-jp's fork): a tensor is split into a grid of
fragments, as tensor parallelism splits it, each fragment is flattened, and each data-parallel rank
stores a piece of it. The stored entry has the shape ``[grid..., elements of a fragment]``; stacked
layers are the first dimension of the grid (megatron/core/dist_checkpointing/strategies/torch.py).

``dp_reshardable`` (default from core 0.15 on): each model-parallel rank stores the buckets of its
parameter buffer. A rank places its parameters in the buffer in reverse order, each at a multiple of
64 elements, and splits the buffer into buckets. Each bucket is one flat tensor, and each piece of a
parameter in it one chunk (megatron/core/optimizer/distrib_optimizer.py,
``sharded_param_state_dp_reshardable``; megatron/core/distributed/param_and_grad_buffer.py).
Names are not stored: they follow from the order in which megatron-core's model registers its
parameters. The derived names are checked against the bounds of the chunks, which must be those of
the parameters, and against the norms and biases, which must be equal to the model's.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_llmjp.config.pipeline_layout import ModelChunk, split_layers
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files import torch_dist
from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import Extents, copy_into
from megatron_llmjp.convert.files.torch_dist import ChunkTensor, TensorEntry
from megatron_llmjp.convert.formats import mcore_names
from megatron_llmjp.convert.formats.mcore_names import stored_key
from megatron_llmjp.convert.formats.megatron_lm.pipeline_arguments import parallel_of_args
from megatron_llmjp.convert.formats.rank_files import RankTensors, check_parallel_sizes, rank_shape
from megatron_llmjp.convert.plan import TensorRead
from megatron_llmjp.convert.tensors import (
    LAYER,
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    Shape,
    rectangular_parts,
    tensor_shapes,
)
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    import torch

_PREFIX = "optimizer.distributed."
_BUCKET = re.compile(
    rf"{re.escape(_PREFIX)}dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_(.+)\.bucket_idx_(\d+)\.(\w+)"
)
_ALIGNMENT = 64
"""Elements; ``pad_param_start`` in megatron/core/optimizer/param_layout.py."""
_COMMON_ORDER = (
    "self_attention.linear_qkv",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_ORDERS = {
    "transformer_engine": ("self_attention.linear_proj", "input_layernorm", *_COMMON_ORDER),
    "local": ("input_layernorm", "self_attention.linear_proj", *_COMMON_ORDER),
}
"""Modules of a layer in the order of their parameters; Transformer Engine fuses norms."""


@dataclass(frozen=True)
class FlatFragment:
    """A rectangular part of a tensor, stored as flat pieces."""

    pieces: tuple[tuple[int, ChunkTensor], ...]
    """Index of the first element of each piece, and the piece."""
    shape: Shape
    dtype: DType

    @property
    def source(self) -> str:
        """Path of the first piece's file."""
        return self.pieces[0][1].source

    @property
    def checksum_ranges(self) -> tuple[ChecksumRange, ...]:
        """The ranges whose CRC-32 includes the fragment's bytes."""
        return tuple(
            checksum_range for _, chunk in self.pieces for checksum_range in chunk.checksum_ranges
        )

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read the fragment into new memory, or into a contiguous tensor of as many elements.

        Raises:
            UserError: a file is damaged.
        """
        import torch

        flat = torch.empty(math.prod(self.shape), dtype=self.dtype.torch)
        for start, chunk in self.pieces:
            flat[start : start + math.prod(chunk.shape)] = chunk.read().flatten()
        return copy_into(flat.view(self.shape), into)

    def extents(self) -> Extents | None:
        """Return the locations of all pieces, unless the elements of one are reordered.

        Raises:
            UserError: a file is damaged.
        """
        found: Extents = []
        for start, chunk in self.pieces:
            extents = chunk.extents()
            if extents is None:
                return None
            found += [(start + first, stored) for first, stored in extents]
        return found


def read_flat_fragments(
    model: ModelConfig, entries: dict[str, TensorEntry]
) -> dict[str, TensorRead]:
    """Return how to read every canonical tensor of one kind of state in flat fragments.

    Raises:
        UserError: the pieces of a tensor do not cover it.
    """
    rows = math.prod(entries[WORD_EMBEDDINGS].shape) // model.hidden_size
    found = {}
    for name, shape in tensor_shapes(model, rows).items():
        key, layer = stored_key(name)
        entry = entries.get(key) or entries.get(name)
        if entry is not None:
            found[name] = _read_fragments(name, entry, shape, layer if key in entries else None)
    return found


def _read_fragments(name: str, entry: TensorEntry, shape: Shape, layer: int | None) -> TensorRead:
    stacked = layer is not None
    grid = entry.shape[stacked:-1]
    where = next(iter(entry.chunks.values()))[0].parent
    if len(grid) != len(shape) or any(n % g for n, g in zip(shape, grid, strict=True)):
        raise UserError(f"{where}: {name} {shape} is not divisible into its fragments {grid}")
    sizes = tuple(n // g for n, g in zip(shape, grid, strict=True))
    pieces: dict[Shape, list[tuple[int, ChunkTensor]]] = {}
    for (offsets, lengths), place in entry.chunks.items():
        if stacked and offsets[0] != layer:
            continue
        if any(length != 1 for length in lengths[:-1]):
            raise UserError(f"{where}: a piece of {name} spans several fragments")
        cell = tuple(i * n for i, n in zip(offsets[stacked:-1], sizes, strict=True))
        chunk = ChunkTensor(*place, lengths[-1:], entry.dtype, entry.files.get(place[0]))
        pieces.setdefault(cell, []).append((offsets[-1], chunk))
    covered = sum(chunk.shape[0] for cell in pieces.values() for _, chunk in cell)
    if covered != math.prod(shape):
        raise UserError(f"{where}: the pieces of {name} {shape} do not cover it")
    parts = [FlatFragment(tuple(cell), sizes, entry.dtype) for cell in pieces.values()]
    return TensorRead(
        shape, entry.dtype, parts, partial(rectangular_parts, places=[(c, sizes) for c in pieces])
    )


Buckets = dict[tuple[int, int], list[TensorEntry]]
"""The buckets of one kind of state, by model-parallel rank and model chunk."""


def has_buckets(keys: Iterator[str]) -> bool:
    """Return whether a checkpoint with these keys contains optimizer state in buckets."""
    return any(key.startswith(_PREFIX) for key in keys)


def read_param_groups(where: Path) -> list[dict[str, Any]]:
    """Read the settings of the parameter groups, which each rank stores with its buckets.

    Raises:
        UserError: the settings are missing.
    """
    stored = torch_dist.read_object(where, f"{_PREFIX}dp_group_idx_0.optimizer/shard_0_1")
    stored = stored[0] if isinstance(stored, list) and len(stored) == 1 else stored
    if not isinstance(stored, dict) or not stored.get("param_groups"):
        raise _unsupported(where, "its parameter groups are missing")
    groups: list[dict[str, Any]] = stored["param_groups"]
    return groups


def read_buckets(
    model: ModelConfig, entries: dict[str, TensorEntry], args: Any, where: Path
) -> dict[str, dict[str, TensorRead]]:
    """Return how to read every canonical tensor of every kind of state in buckets.

    Args:
        model: the architecture.
        entries: all tensors of the checkpoint.
        args: the run's arguments, which contain its parallel layout.
        where: the folder, for messages.

    Raises:
        UserError: the layout of the buckets is not supported.
    """
    kinds = _buckets_by_kind(entries, where)
    weights = mcore_names.model_entries(entries)
    if "param" not in kinds or WORD_EMBEDDINGS not in weights:
        raise _unsupported(where, "the model's weights are missing")
    rows = weights[WORD_EMBEDDINGS].shape[0]
    known = mcore_names.tensor_reads(model, rows, weights)
    for order in _ORDERS.values():
        found = {
            kind: reads
            for kind, buckets in kinds.items()
            if (reads := _read_kind(model, rows, buckets, order, args, where)) is not None
        }
        if found.keys() == kinds.keys() and _equal_norms_and_biases(found["param"], known):
            return found
    raise _unsupported(where, "no known order of parameters matches the bounds, norms and biases")


def _unsupported(where: Path, why: str) -> UserError:
    return UserError(
        f"{where}: unsupported dp_reshardable optimizer state ({why}); load the checkpoint with "
        "the program that saved it, and save it with --dist-ckpt-optim-fully-reshardable"
    )


def _buckets_by_kind(entries: dict[str, TensorEntry], where: Path) -> dict[str, Buckets]:
    """Return the buckets in order, by kind of state."""
    numbered: dict[str, dict[tuple[int, int], dict[int, TensorEntry]]] = {}
    types: dict[tuple[int, int], set[str]] = {}
    for key, entry in entries.items():
        match = _BUCKET.fullmatch(key)
        if match is None:
            if key.startswith(_PREFIX):
                raise _unsupported(where, f"{key} is not a bucket")
            continue
        place = int(match[1]), int(match[2])
        types.setdefault(place, set()).add(match[3])
        numbered.setdefault(match[5], {}).setdefault(place, {})[int(match[4])] = entry
    if any(len(found) > 1 for found in types.values()):
        raise _unsupported(where, "parameters of several types")
    return {
        kind: {place: [found[i] for i in sorted(found)] for place, found in places.items()}
        for kind, places in numbered.items()
    }


def _read_kind(
    model: ModelConfig,
    rows: int,
    buckets: Buckets,
    order: tuple[str, ...],
    args: Any,
    where: Path,
) -> dict[str, TensorRead] | None:
    """Return how to read one kind of state, assuming an order of a layer's modules.

    None if the order does not match the buckets.
    """
    parallel = parallel_of_args(args, where)
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    check_parallel_sizes(model, tensor)
    stages = split_layers(parallel, model.num_layers)
    virtual = len(stages[0])
    if sorted(buckets) != [(r, v) for r in range(tensor * pipeline) for v in range(virtual)]:
        raise _unsupported(
            where,
            f"the buckets are not those of TP {tensor} x PP {pipeline}"
            + (f" with {virtual} virtual stages" if virtual > 1 else ""),
        )
    shape_of = tensor_shapes(model, rows)
    gathered = RankTensors()
    for (rank, number), own in buckets.items():
        stage, t = divmod(rank, tensor)
        held = {}
        for name in _parameter_order(model, list(shape_of), stages[stage][number], order):
            whole = WORD_EMBEDDINGS if name not in shape_of else name
            held[name] = rank_shape(whole, model, shape_of[whole], tensor)
        fragments = _locate(held, own)
        if fragments is None:
            return None
        for name, fragment in fragments.items():
            if name in shape_of:
                gathered.add(name, t, fragment)
    return gathered.reads(where, model, tensor)


def _parameter_order(
    model: ModelConfig, names: list[str], chunk: ModelChunk, order: tuple[str, ...]
) -> list[str]:
    """Return the parameters of a model chunk, in order."""
    found = [name for name in names if name.startswith("embedding.") and chunk.embedding]
    for layer in range(chunk.first_layer, chunk.first_layer + chunk.layers):
        prefix = LAYER.format(i=layer)
        inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        inner.sort(key=lambda name: order.index(name.rpartition(".")[0]))  # weight, then bias
        found += [prefix + name for name in inner]
    if chunk.output:
        found += [n for n in names if not n.startswith(("embedding.", LAYER.partition("{")[0]))]
        if not chunk.embedding and not model.untie_embeddings_and_output_weights:
            found.append(OUTPUT_LAYER)  # the last stage's copy of the embedding
    return found


def _locate(held: dict[str, Shape], buckets: list[TensorEntry]) -> dict[str, FlatFragment] | None:
    """Locate each parameter in the buckets; None if parameters do not fill the buckets exactly."""
    found = {}
    number = end = 0
    for name in reversed(held):
        size = math.prod(held[name])
        start = _aligned(end)
        if start + size > buckets[number].shape[0]:
            if buckets[number].shape[0] not in (end, start) or number + 1 == len(buckets):
                return None
            number, start = number + 1, 0
        end = start + size
        fragment = _join_chunks(buckets[number], start, end, held[name])
        if fragment is None:
            return None
        found[name] = fragment
    return found if (number + 1, end) == (len(buckets), buckets[-1].shape[0]) else None


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _join_chunks(bucket: TensorEntry, start: int, end: int, shape: Shape) -> FlatFragment | None:
    """Return the chunks of a range of elements; None if its bounds are not bounds of chunks."""
    chunks = sorted(bucket.chunks)
    pieces = []
    position = start
    for chunk_range in chunks[bisect_left(chunks, ((start,), (0,))) :]:
        (offset,), (length,) = chunk_range
        if position == end or offset != position or offset + length > end:
            break
        place = bucket.chunks[chunk_range]
        chunk = ChunkTensor(*place, (length,), bucket.dtype, bucket.files.get(place[0]))
        pieces.append((offset - start, chunk))
        position += length
    return FlatFragment(tuple(pieces), shape, bucket.dtype) if position == end else None


def _equal_norms_and_biases(found: dict[str, TensorRead], known: dict[str, TensorRead]) -> bool:
    """Return whether the main weights of all norms and biases, rounded, equal the model's."""
    import torch

    vectors = [name for name, read in known.items() if len(read.shape) == 1]
    return all(
        name in found
        and torch.equal(found[name].read(name).to(known[name].dtype.torch), known[name].read(name))
        for name in vectors
    )
