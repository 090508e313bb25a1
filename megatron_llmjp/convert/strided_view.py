"""Views of a contiguous tensor without data: shape, strides and offset.

A layout (``tensors.py``) applied to a :class:`StridedView` instead of a tensor gives the places of
its parts. Methods have the names and the meaning of torch's, which takes seconds to import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StridedView:
    """A view; strides and offset are in elements of the tensor."""

    shape: Shape
    strides: Shape
    offset: int = 0

    @staticmethod
    def of(shape: Sequence[int]) -> StridedView:
        """Return the view of a whole contiguous tensor."""
        return StridedView(tuple(shape), contiguous_strides(shape))

    def stride(self) -> Shape:
        """Return the strides."""
        return self.strides

    def storage_offset(self) -> int:
        """Return the first element."""
        return self.offset

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def view(self, *sizes: int) -> StridedView:
        """Return a contiguous view with other sizes, one of which may be -1.

        Raises:
            ValueError: the view is not contiguous, or the sizes do not fit.
        """
        known = math.prod(size for size in sizes if size != -1)
        filled = [size if size != -1 else self.numel() // max(1, known) for size in sizes]
        if self.strides != contiguous_strides(self.shape) or math.prod(filled) != self.numel():
            raise ValueError(f"{self} cannot be viewed as {sizes}")
        return StridedView(tuple(filled), contiguous_strides(filled), self.offset)

    def permute(self, *dims: int) -> StridedView:
        """Reorder the dimensions."""
        shape, strides = ([values[dim] for dim in dims] for values in (self.shape, self.strides))
        return StridedView(tuple(shape), tuple(strides), self.offset)

    def t(self) -> StridedView:
        """Transpose a matrix; vectors stay as they are."""
        return self.permute(*reversed(range(self.dim())))

    def narrow(self, dim: int, start: int, length: int) -> StridedView:
        """Return a range of a dimension.

        Raises:
            ValueError: the range is not inside the dimension.
        """
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise ValueError(f"{start} to {start + length} is outside dimension {dim} of {self}")
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return StridedView(shape, self.strides, self.offset + start * self.strides[dim])

    def chunk(self, count: int, dim: int = 0) -> list[StridedView]:
        """Split a dimension into up to ``count`` ranges of equal size; the last may be smaller."""
        size = self.shape[dim]
        step = max(1, -(-size // count))
        starts = range(0, max(1, size), step)
        return [self.narrow(dim, start, min(step, size - start)) for start in starts]

    def __getitem__(self, key: int | slice | tuple[int | slice, ...]) -> StridedView:
        keys = key if isinstance(key, tuple) else (key,)
        found, dim = self, 0
        for each in keys:
            size = found.shape[dim]
            if isinstance(each, slice):
                start, stop, step = each.indices(size)
                if step != 1:
                    raise ValueError(f"steps are not supported: {each}")
                found, dim = found.narrow(dim, start, max(0, stop - start)), dim + 1
            else:
                found = found.narrow(dim, each if each >= 0 else size + each, 1)._without(dim)
        return found

    def _without(self, dim: int) -> StridedView:
        """Remove a dimension of size 1."""
        shape, strides = (v[:dim] + v[dim + 1 :] for v in (self.shape, self.strides))
        return StridedView(shape, strides, self.offset)


def contiguous_strides(shape: Sequence[int]) -> Shape:
    """Return the strides of a contiguous tensor, as torch defines them for empty dimensions."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))
