"""Places where the host waits for the device, and the devices that operations use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
_SIZE_DEPENDS_ON_VALUES = {
    _ATEN.nonzero.default: "nonzero",
    _ATEN.masked_select.default: "masked_select",
    _ATEN.unique_dim.default: "unique",
    _ATEN._unique2.default: "unique",
    _ATEN.repeat_interleave.Tensor: "repeat_interleave",
    _ATEN.equal.default: "equal",
    _ATEN.bincount.default: "bincount",
}
"""Operations on CUDA tensors whose result the host reads."""


@dataclass(frozen=True, order=True)
class HostWait:
    """A place in the code where the host waits for the device."""

    operation: str
    place: str
    """``file:function``; the innermost function outside torch."""


class HostWaits(TorchDispatchMode):
    """Records host waits and devices; answers ``.item()``, since fake tensors have no values.

    Args:
        answers: values of ``.item()`` by the name of the function that calls it; 1 elsewhere.
    """

    def __init__(self, answers: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.seen: list[HostWait] = []
        """All waits since :meth:`take`."""
        self.devices: set[str] = set()
        """Devices of the results of all operations."""
        self.answers = dict(answers or {})
        self._pinned: dict[int, Any] = {}

    def take(self) -> list[HostWait]:
        """Return the waits since the last call."""
        taken, self.seen = self.seen, []
        return taken

    def record(self, operation: str) -> None:
        """Record a wait at the current place."""
        self.seen.append(HostWait(operation, place()[0]))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN._local_scalar_dense.default:
            return self._item(args[0])
        if func is _ATEN.is_pinned.default:
            return self._is_pinned(args[0])
        if func in (_ATEN._pin_memory.default, _ATEN.pin_memory.default):
            return self._pin(_ATEN.clone.default(args[0]))
        if func in (_ATEN._to_copy.default, _ATEN.copy_.default):
            return self._copy(func, args, kwargs)
        if _waits(func, args):
            self.record(_SIZE_DEPENDS_ON_VALUES.get(func, "boolean index"))
            if (largest := _largest_result(func, args)) is not None:
                return largest
        pin = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        for made in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(made, Tensor):
                self.devices.add(str(made.device))
        return self._pin(result) if pin else result

    def _item(self, tensor: Tensor) -> Any:
        path, function = place()
        if tensor.is_cuda:
            self.seen.append(HostWait("item", path))
        elif (constant := getattr(tensor, "constant", None)) is not None:
            return constant.item()
        return self.answer(tensor.dtype, function)

    def answer(self, dtype: torch.dtype, function: str) -> Any:
        """Return the value that a function reads from a tensor."""
        value = self.answers.get(function, 1.0)
        if dtype.is_floating_point:
            return value
        return bool(value) if dtype is torch.bool else int(value)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copy; between devices the host waits, but for pinned memory and ``non_blocking``."""
        is_new = func is _ATEN._to_copy.default
        source = args[0] if is_new else args[1]
        in_place_flag = not is_new and len(args) > 2 and args[2]
        blocks = not (kwargs.get("non_blocking", False) or in_place_flag)
        result = func(*args, **kwargs)
        target = result.device.type
        if isinstance(source, Tensor) and {source.device.type, target} == {"cpu", "cuda"}:
            host = source if target == "cuda" else result
            if is_new and target == "cpu" and not blocks:
                self._pin(result)  # torch allocates it so
            if blocks or not self._is_pinned(host):
                kind = "copy" if blocks else "copy of pageable memory"
                self.record(f"{kind} {source.device.type} to {target}")
        self.devices.add(str(result.device))
        return result

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage  # kept, so that its address is not used again
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned


def _waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the size of an operation's result depends on values on the device."""
    if func in _SIZE_DEPENDS_ON_VALUES:
        return bool(args[0].is_cuda)
    if func is _ATEN.index.Tensor:
        return _has_mask(args[1])
    if func in (_ATEN.index_put_.default, _ATEN.index_put.default, _ATEN._index_put_impl_.default):
        value = args[2]  # one value from the host is filled in without counting the positions
        return _has_mask(args[1]) and not (value.numel() == 1 and value.device.type == "cpu")
    return False


def _largest_result(func: Any, args: tuple[Any, ...]) -> Any:
    """Return the result if all values were true; None where that is not known.

    torch raises ``DynamicOutputShapeException`` for the others, with the name of the operation.
    """
    tensor = args[0]
    if func is _ATEN.equal.default:
        return True
    if func is _ATEN.nonzero.default:
        return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)
    if func is _ATEN.masked_select.default:
        return tensor.new_empty(tensor.numel())
    if func is _ATEN.index.Tensor and len(args[1]) == 1:
        mask = args[1][0]
        return tensor.new_empty((mask.numel(), *tensor.shape[mask.dim() :]))
    return None


def _has_mask(indices: list[Tensor | None]) -> bool:
    masks = (i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8))
    return any(mask.is_cuda for mask in masks)


def read_values_through(waits: HostWaits) -> None:
    """Make ``.tolist()`` and ``torch.tensor`` of device scalars record their waits.

    Both read values below the dispatcher, where there are none.
    """

    def tolist(tensor: Tensor) -> Any:
        if tensor.is_cuda:
            waits.record("tolist")
        value = waits.answer(tensor.dtype, place()[1])
        for size in reversed(tensor.shape):
            value = [value] * size
        return value

    make: Callable[..., Tensor] = torch.tensor

    def tensor(
        data: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any
    ) -> Tensor:
        made = make(_on_host(data), **kwargs)  # on the host, so that the copy is seen
        made = made if device is None else made.to(device)
        return made.requires_grad_(requires_grad)

    FakeTensor.tolist = tolist  # type: ignore[method-assign]
    torch.tensor = tensor  # type: ignore[assignment]


def _on_host(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return [_on_host(value) for value in data]
    return data.item() if isinstance(data, Tensor) and data.is_cuda else data


_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)


_COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
"""Functions before Python 3.12, as which they are not counted."""


def place() -> tuple[str, str]:
    """Return the innermost function outside torch as ``file:function``, and its name."""
    frame = sys._getframe(1)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if not file.startswith((_TORCH, _OWN, "<")) and function not in _COMPREHENSIONS:
            return f"{_short(file)}:{function}", function
        frame = frame.f_back  # type: ignore[assignment]
    return "torch", ""


def _short(name: str) -> str:
    """Return a path from its package on."""
    for package in ("megatron_llmjp/", "megatron/core/", "transformer_engine/", "tests/"):
        if f"/{package}" in name:
            return package + name.rpartition(f"/{package}")[2]
    return name
