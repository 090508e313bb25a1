"""Comparison of two checkpoints of any formats (``inspect A B``), one tensor at a time.

Canonical tensors are compared bit by bit, so that the parallel layout and the format have no
effect. Memory: both copies of one tensor, and blocks in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.convert.files.storage import byte_count, dtype_name
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.tensors import VOCABULARY, Shape
from megatron_llmjp.convert.verification.model_differences import model_differences
from megatron_llmjp.report.json_lines import json_values

BLOCK = 1 << 20
"""Elements that are compared in fp64 at once."""

_SAME_SIZE_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class TensorDifference:
    """How a tensor of the second checkpoint differs from that of the first."""

    name: str
    shapes: tuple[Shape, Shape]
    dtypes: tuple[str, str]
    differing: int = 0
    """Number of elements with other bits, or with other values if the types differ."""
    elements: int = 0
    """Number of compared elements; 0 if the shapes differ."""
    max_abs: float = 0.0
    """Largest absolute difference of two finite elements."""
    index: Shape | None = None
    """Its index in the tensor."""
    values: tuple[float, float] | None = None
    """Both elements there."""
    relative: float = 0.0
    """L2 norm of the difference, relative to that of the first tensor."""
    not_finite: int = 0
    """Number of differing elements of which at least one is NaN or infinite."""

    @property
    def is_difference(self) -> bool:
        """Whether the tensors differ at all."""
        return self.elements == 0 or self.differing > 0 or self.dtypes[0] != self.dtypes[1]


@dataclass
class Comparison:
    """The differences between two checkpoints."""

    first: Path
    second: Path
    tensors: int
    """Number of tensors in both."""
    differences: list[TensorDifference] = field(default_factory=list)
    only_in_first: list[str] = field(default_factory=list)
    only_in_second: list[str] = field(default_factory=list)
    model: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Fields of the architecture with other values."""
    notes: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Whether no difference was found."""
        lists = (self.differences, self.only_in_first, self.only_in_second, self.model)
        return not any(lists)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as a JSON object; values that are not finite become null."""
        content = {"equal": self.is_equal, **asdict(self)}
        content |= {"first": str(self.first), "second": str(self.second)}
        found: dict[str, Any] = json_values(content)
        return found


def compare_checkpoints(
    first: SourceCheckpoint,
    second: SourceCheckpoint,
    progress: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Compare the weights and the architectures of two checkpoints.

    Args:
        first, second: the checkpoints.
        progress: receives the bytes that were read after each tensor.

    Raises:
        UserError: a file is damaged.
    """
    common = [name for name in first.reads if name in second.reads]
    found = Comparison(
        first.path,
        second.path,
        len(common),
        only_in_first=[name for name in first.reads if name not in second.reads],
        only_in_second=[name for name in second.reads if name not in first.reads],
        model=model_differences(first.model, second.model),
        notes=_vocabulary_notes(first, second),
    )
    with ThreadPoolExecutor(1, "compare") as pool:  # reads the second copy meanwhile
        for name in common:
            reads = first.reads[name], second.reads[name]
            shapes = reads[0].shape, reads[1].shape
            dtypes = dtype_name(reads[0].dtype), dtype_name(reads[1].dtype)
            difference = TensorDifference(name, shapes, dtypes)
            if shapes[0] == shapes[1] or _has_other_padding(name, shapes):
                other = pool.submit(reads[1].read, name)
                _compare(difference, reads[0].read(name), other.result())
            if difference.is_difference:
                found.differences.append(difference)
            progress(sum(byte_count(read.shape, read.dtype) for read in reads))
    return found


def _has_other_padding(name: str, shapes: tuple[Shape, Shape]) -> bool:
    return name in VOCABULARY and shapes[0][1:] == shapes[1][1:]


def _vocabulary_notes(first: SourceCheckpoint, second: SourceCheckpoint) -> list[str]:
    rows = sorted({first.padded_vocab_size, second.padded_vocab_size})
    if len(rows) == 1:
        return []
    return [f"vocabulary: rows {rows[0]} to {rows[1] - 1} exist in one only and are not compared"]


def _compare(found: TensorDifference, first: torch.Tensor, second: torch.Tensor) -> None:
    """Compare two tensors of the same shape, except for the number of rows, block by block."""
    rows = min(first.shape[0], second.shape[0])
    first, second = first[:rows], second[:rows]
    found.elements = first.numel()
    if _same_bits(first, second):
        return
    shape, squares, norm = tuple(first.shape), 0.0, 0.0
    largest = -1.0
    for start, a, b in _blocks(first, second):
        differing = _differing(a, b)
        count = int(differing.sum())
        x, y = a.double(), b.double()
        norm += float(torch.nansum(x.square()))
        if count == 0:
            continue
        found.differing += count
        gap = (x - y).abs_()
        finite = differing & torch.isfinite(gap)
        found.not_finite += count - int(finite.sum())
        gap[~finite] = -1.0
        squares += float(gap.clamp_min(0.0).square_().sum())
        place = int(gap.argmax())
        if float(gap[place]) > largest:
            largest = found.max_abs = float(gap[place])
            index = torch.unravel_index(torch.tensor(start + place), shape)
            found.index = tuple(int(i) for i in index)
            found.values = float(x[place]), float(y[place])
    if found.differing:
        found.relative = math.sqrt(squares / norm) if norm else math.inf


def _blocks(
    first: torch.Tensor, second: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the index of the first element of each block, and the block of both tensors."""
    a, b = first.flatten(), second.flatten()
    for start in range(0, a.numel(), BLOCK):
        yield start, a[start : start + BLOCK], b[start : start + BLOCK]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    kind = _SAME_SIZE_INTEGERS[a.dtype.itemsize]
    return torch.equal(a.view(kind), b.view(kind))


def _differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return where elements have other bits; of other types, where they have other values."""
    if a.dtype == b.dtype:
        kind = _SAME_SIZE_INTEGERS[a.dtype.itemsize]
        return a.view(kind) != b.view(kind)
    x, y = a.double(), b.double()
    return (x != y) & ~(x.isnan() & y.isnan())


def format_comparison(found: Comparison) -> str:
    """Describe the differences, one line each, and a summary."""
    lines = [f"model: {name}: {a} / {b}" for name, (a, b) in found.model.items()]
    lines += [f"{name}: only in {found.first}" for name in found.only_in_first]
    lines += [f"{name}: only in {found.second}" for name in found.only_in_second]
    lines += [_format_difference(difference) for difference in found.differences]
    lines += [f"note: {note}" for note in found.notes]
    if found.is_equal:
        return "\n".join([*lines, f"equal: {found.tensors} tensors, bit by bit"])
    summary = f"{len(found.differences)} of {found.tensors} tensors differ"
    largest = max(found.differences, key=lambda each: each.max_abs, default=None)
    if largest is not None and largest.max_abs > 0.0:
        summary += f"; largest difference {largest.max_abs:.3g} in {largest.name}"
    return "\n".join([*lines, summary])


def _format_difference(found: TensorDifference) -> str:
    if found.elements == 0:
        return f"{found.name}: shape {found.shapes[0]} / {found.shapes[1]}"
    text = f"{found.name}: "
    if found.dtypes[0] != found.dtypes[1]:
        text += f"type {found.dtypes[0]} / {found.dtypes[1]}, "
    if found.differing == 0:
        return f"{text}equal values"
    text += f"{found.differing:,} of {found.elements:,} elements differ"
    if found.values is not None:
        text += (
            f", at most by {found.max_abs:.3g} at {list(found.index or ())}: "
            f"{found.values[0]:.6g} / {found.values[1]:.6g}, relative L2 {found.relative:.3g}"
        )
    if found.not_finite:
        text += f"; {found.not_finite:,} with NaN or infinity"
    return text
