"""Pickles that refer to torch by name, written without importing torch.

A pickle contains the names of functions and classes, and the arguments to call them with. Python's
pickler imports each to check that the name is right; this one does not for names in torch.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

from megatron_llmjp.convert.files.dtypes import DType


@dataclass(frozen=True)
class TorchName:
    """A function, class or type in torch, in an object to be pickled."""

    module: str
    name: str

    def __call__(self, *_: Any) -> Any:
        """Refuse the call; the pickler requires callables."""
        raise TypeError(f"{self.module}.{self.name} can only be pickled")


class Size(tuple[int, ...]):
    """Pickled as a ``torch.Size``."""

    __module__ = "torch"
    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Size, (tuple(self),)


class TorchPickler(pickle._Pickler):
    """Pickler of :class:`TorchName`, :class:`DType`, and of classes whose module is in torch."""

    def reducer_override(self, value: Any) -> Any:
        """Return the name of an object in torch."""
        if isinstance(value, TorchName | DType):
            return value.name
        if isinstance(value, type) and _is_in_torch(value.__module__):
            return value.__qualname__
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the name of a function or class; those of torch are not imported."""
        module = obj.module if isinstance(obj, TorchName) else obj.__module__
        if isinstance(obj, DType):
            module = str(b"torch", "ascii")  # a new object, as that of torch: it is not shared
        if name is None or not _is_in_torch(module):
            super().save_global(obj, name)  # type: ignore[misc]
        elif self.proto >= 4:  # type: ignore[attr-defined]
            self.save(module)  # type: ignore[attr-defined]
            self.save(name)  # type: ignore[attr-defined]
            self.write(pickle.STACK_GLOBAL)  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]


def _is_in_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


def dump_torch_pickle(value: Any) -> bytes:
    """Return the pickle of an object in Python's default protocol."""
    stream = io.BytesIO()
    TorchPickler(stream, pickle.DEFAULT_PROTOCOL).dump(value)
    return stream.getvalue()
