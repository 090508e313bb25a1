"""Unpickler whose memory is bounded by the size of the pickle.

CPython's C implementation trusts sizes in the data: ten bytes can make it allocate and fill
gigabytes for its memo (LONG_BINPUT) or a byte array (BYTEARRAY8). Neither implementation limits the
nesting of tuples, whose hash overflows the C stack.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

MAX_TUPLE_DEPTH = 500
"""Levels of nested tuples that are accepted."""

_TUPLES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_LENGTH_BYTES = 8


class BoundedUnpickler(pickle._Unpickler):
    """Pure Python unpickler of a pickle in memory."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes, **options: Any) -> None:
        """Read the pickle in ``data``; the options are those of ``pickle.Unpickler``."""
        super().__init__(io.BytesIO(data), **options)
        self._tuple_depths: dict[int, int] = {}

    def load_bounded_bytearray(self) -> None:
        """Load a byte array: at most the bytes that exist."""
        length = int.from_bytes(self.read(_LENGTH_BYTES), "little")  # type: ignore[attr-defined]
        data = self.read(length)  # type: ignore[attr-defined]
        if len(data) < length:
            raise pickle.UnpicklingError("pickle data was truncated")
        self.append(bytearray(data))  # type: ignore[attr-defined]

    def load_bounded_tuple(self, load: Callable[[Any], None]) -> None:
        """Load a tuple and limit its depth."""
        load(self)
        created = self.stack[-1]  # type: ignore[attr-defined]
        depths = (self._tuple_depths.get(id(item), 0) for item in created if type(item) is tuple)
        depth = 1 + max(depths, default=0)
        if depth > MAX_TUPLE_DEPTH:
            raise pickle.UnpicklingError("tuples are nested too deeply")
        self._tuple_depths[id(created)] = depth


def _bounded(load: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda unpickler: unpickler.load_bounded_tuple(load)


BoundedUnpickler.dispatch[pickle.BYTEARRAY8[0]] = BoundedUnpickler.load_bounded_bytearray
BoundedUnpickler.dispatch |= {
    code[0]: _bounded(pickle._Unpickler.dispatch[code[0]]) for code in _TUPLES
}
