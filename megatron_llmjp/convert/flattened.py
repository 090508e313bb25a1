"""Optimizer state of ``fully_sharded_model_space``: flat pieces of fragments.

The format of megatron-core's distributed optimizer in LLM-jp's fork (core 0.12): a tensor is cut
into a grid of fragments, as tensor parallelism cuts it, each fragment is flattened, and each
data-parallel rank stores a piece of it. On disk the entry has the shape ``[grid..., elements of a
fragment]``; stacked layers are the first axis of the grid
(megatron/core/dist_checkpointing/strategies/torch.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.dcp import ChunkTensor, StoredEntry
from megatron_llmjp.convert.mcore_names import on_disk
from megatron_llmjp.convert.plan import Read
from megatron_llmjp.convert.regions import Region
from megatron_llmjp.convert.storage import byte_count, placed
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS, Shape, boxes, shapes
from megatron_llmjp.errors import UserError


@dataclass(frozen=True)
class Fragment:
    """A rectangular part of a tensor, stored as flat pieces."""

    pieces: tuple[tuple[int, ChunkTensor], ...]
    """Number of the first element, and where the elements from there on are."""
    shape: Shape
    dtype: torch.dtype

    @property
    def source(self) -> str:
        """The file of the first piece."""
        return self.pieces[0][1].source

    @property
    def regions(self) -> tuple[Region, ...]:
        """The checksums that reading it takes part in."""
        return tuple(region for _, chunk in self.pieces for region in chunk.regions)

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read it, into fresh memory or a contiguous tensor of as many elements.

        Raises:
            UserError: a file is damaged.
        """
        flat = torch.empty(byte_count(self.shape, torch.uint8), dtype=self.dtype)
        for start, chunk in self.pieces:
            flat[start : start + byte_count(chunk.shape, torch.uint8)] = chunk.read().flatten()
        return placed(flat.view(self.shape), into)


def unflattened(model: ModelConfig, entries: dict[str, StoredEntry]) -> dict[str, Read]:
    """How to read every canonical tensor of one kind of state.

    Raises:
        UserError: a tensor is missing, or its pieces do not cover it.
    """
    rows = byte_count(entries[WORD_EMBEDDINGS].shape, torch.uint8) // model.hidden_size
    found = {}
    for name, shape in shapes(model, rows).items():
        key, layer = on_disk(name)
        entry = entries.get(key) or entries.get(name)
        if entry is not None:
            found[name] = _read(name, entry, shape, layer if key in entries else None)
    return found


def _read(name: str, entry: StoredEntry, shape: Shape, layer: int | None) -> Read:
    stacked = layer is not None
    grid = entry.shape[stacked:-1]
    where = next(iter(entry.chunks.values()))[0].parent
    if len(grid) != len(shape) or any(n % g for n, g in zip(shape, grid, strict=True)):
        raise UserError(f"{where}: {name} {shape} was cut into fragments {grid}, which do not fit")
    sizes = tuple(n // g for n, g in zip(shape, grid, strict=True))
    pieces: dict[Shape, list[tuple[int, ChunkTensor]]] = {}
    for (offsets, lengths), place in entry.chunks.items():
        if stacked and offsets[0] != layer:
            continue
        if any(length != 1 for length in lengths[:-1]):
            raise UserError(f"{where}: a piece of {name} spans fragments")
        cell = tuple(i * n for i, n in zip(offsets[stacked:-1], sizes, strict=True))
        chunk = ChunkTensor(*place, lengths[-1:], entry.dtype, entry.files.get(place[0]))
        pieces.setdefault(cell, []).append((offsets[-1], chunk))
    covered = sum(chunk.shape[0] for cell in pieces.values() for _, chunk in cell)
    if covered != byte_count(shape, torch.uint8):
        raise UserError(f"{where}: the pieces of {name} {shape} do not cover it")
    parts = [Fragment(tuple(cell), sizes, entry.dtype) for cell in pieces.values()]
    return Read(shape, entry.dtype, parts, partial(boxes, places=[(c, sizes) for c in pieces]))
