"""DeepSpeed's ZeRO-1 and 2 optimizer files: the fp32 weights that training goes on from.

Each ``*zero_pp_rank_D_mp_rank_MM_optim_states.pt`` holds one data-parallel slice of flat arrays,
one per parameter group; ``param_shapes`` of ``mp_rank_MM`` lists what lies in them, in order.
Source: deepspeed/utils/zero_to_fp32.py, ``_zero2_merge_trainable_params``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.convert.storage import FileTensor, Stored, byte_count, read_elements
from megatron_llmjp.convert.tensors import Shape
from megatron_llmjp.convert.torch_archive import load
from megatron_llmjp.errors import UserError

_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")


@dataclass(frozen=True)
class Span:
    """A range of a flat array in a file."""

    flat: FileTensor
    start: int
    count: int


@dataclass(frozen=True)
class SpanTensor:
    """A tensor whose elements lie in consecutive ranges of several files."""

    spans: tuple[Span, ...]
    shape: Shape
    dtype: torch.dtype

    @property
    def source(self) -> str:
        """The first of the files."""
        return str(self.spans[0].flat.path)

    def read(self) -> torch.Tensor:
        """Read it into fresh memory.

        Raises:
            UserError: a file is truncated.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        flat, done = tensor.view(-1), 0
        for span in self.spans:
            offset = span.flat.offset + span.start * self.dtype.itemsize
            part = read_elements(span.flat.path, offset, self.dtype, (span.count,))
            flat[done : done + span.count] = part
            done += span.count
        return tensor


def main_weights(folder: Path, rank: int, param_shapes: Any) -> Iterator[tuple[str, Stored]]:
    """The fp32 weights of one model-parallel rank, by DeepSpeed's parameter names.

    Args:
        folder: ``global_step*``.
        rank: ``MM`` of ``mp_rank_MM``.
        param_shapes: of that rank's file; one dictionary of shapes per parameter group.

    Raises:
        UserError: a file is missing, or the arrays are shorter than the parameters.
    """
    if not param_shapes:
        raise UserError(f"{folder}: rank {rank} has no param_shapes: trained without ZeRO")
    shards = _shards(folder, rank)
    for group, shapes in enumerate(param_shapes):
        flats = [shard[group] for shard in shards]
        start = 0
        for name, shape in shapes.items():
            count = byte_count(tuple(shape), torch.uint8)
            spans = tuple(_spans(flats, start, count))
            if sum(span.count for span in spans) != count:
                raise UserError(f"{flats[-1].path}: ends before parameter {name}")
            yield name, SpanTensor(spans, tuple(shape), flats[0].dtype)
            start += count


def _shards(folder: Path, rank: int) -> list[list[FileTensor]]:
    """The flat arrays of every data-parallel rank, in order."""
    files = {
        int(m[1]): p for p in folder.iterdir() if (m := _FILE.match(p.name)) and int(m[2]) == rank
    }
    if not files or sorted(files) != list(range(len(files))):
        raise UserError(
            f"{folder}: of the optimizer files of mp_rank_{rank:02d} only data-parallel ranks "
            f"{sorted(files)} are there"
        )
    found = []
    for _, path in sorted(files.items()):
        state = load(path).get("optimizer_state_dict") or {}
        groups = state.get("single_partition_of_fp32_groups")
        if groups is None:
            raise UserError(f"{path}: holds no fp32 weights (ZeRO stage 1 or 2 is needed)")
        partitions = state.get("partition_count", len(files))
        count = max(partitions) if isinstance(partitions, list) else partitions
        if count != len(files):
            raise UserError(f"{folder}: {len(files)} of {count} data-parallel ranks are there")
        found.append(list(groups))
    return found


def _spans(flats: list[FileTensor], start: int, count: int) -> Iterator[Span]:
    """The ranges that elements ``start`` to ``start + count`` of joined arrays fall into."""
    base = 0
    for flat in flats:
        length = flat.shape[0]
        first, last = max(start, base), min(start + count, base + length)
        if first < last:
            yield Span(flat, first - base, last - first)
        base += length
