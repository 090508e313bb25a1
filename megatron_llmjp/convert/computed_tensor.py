"""Tensors that are computed from stored ones while they are read, such as averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import byte_count, copy_into
from megatron_llmjp.convert.plan import TensorRead
from megatron_llmjp.convert.tensors import Shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that a function computes, for use as the part of a :class:`TensorRead`."""

    shape: Shape
    dtype: DType
    source: str
    """Path of the first file that is read."""
    checksum_ranges: tuple[ChecksumRange, ...]
    """The ranges of all files that are read."""
    compute: Callable[[], torch.Tensor]

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the tensor in new memory, or into a contiguous tensor of as many elements."""
        return copy_into(self.compute(), into)

    def extents(self) -> None:
        """Return that no file stores the elements."""


def computed_read(
    inputs: Iterable[TensorRead],
    dtype: DType,
    workspace: DType,
    compute: Callable[[], torch.Tensor],
) -> TensorRead:
    """Return how to read a tensor that is computed from tensors of the same shape.

    Args:
        inputs: the tensors that are read.
        dtype: type of the result.
        workspace: type in which one tensor is held for the computation.
        compute: reads the inputs and returns the result.
    """
    reads = list(inputs)
    parts = [part for read in reads for part in (*read.parts, *read.replicas)]
    ranges = dict.fromkeys(found for part in parts for found in part.checksum_ranges)
    shape = reads[0].shape
    tensor = ComputedTensor(shape, dtype, parts[0].source, tuple(ranges), compute)
    return TensorRead(shape, dtype, [tensor], workspace=byte_count(shape, workspace))
