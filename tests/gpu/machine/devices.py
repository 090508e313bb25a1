"""``torch.cuda`` of a machine with eight H100: queries, current device, streams, generators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DEVICES = 8
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
)


def replace_torch_cuda(synchronized: Callable[[str], None]) -> None:
    """Replace the functions of ``torch.cuda`` for the rest of this process.

    Args:
        synchronized: called with the name of each function that waits for the device.
    """
    cuda: Any = torch.cuda
    cuda.synchronize = lambda *_, **__: synchronized("torch.cuda.synchronize")
    cuda.Stream, cuda.Event = _inert_classes(synchronized)
    for name, function in (_queries() | _current_device() | _memory()).items():
        setattr(cuda, name, function)
    cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *_: cuda.Stream())
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *_: None)
    _replace_generators()
    core: Any = torch._C
    core._cuda_clearCublasWorkspaces = lambda: None
    nn.Module._apply = _apply  # type: ignore[method-assign]


def _queries() -> dict[str, Any]:
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda function, **_: function(),
        "device_count": lambda: DEVICES,
        "get_device_name": lambda *_: H100.name,
        "get_device_capability": lambda *_: (H100.major, H100.minor),
        "get_device_properties": lambda *_: H100,
        "is_bf16_supported": lambda *_: True,
    }


def _current_device() -> dict[str, Any]:
    """Keep the current device where the C++ part looks for it."""
    return {
        "current_device": torch.accelerator.current_device_index,
        "set_device": lambda device: torch.accelerator.set_device_index(_index(device)),
        "device": _DeviceContext,
    }


def _index(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


class _DeviceContext:
    """``torch.cuda.device``: another current device within a block."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._before = torch.cuda.current_device()
        if self._device is not None:
            torch.cuda.set_device(self._device)

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_device(self._before)


def _memory() -> dict[str, Any]:
    used = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return {
        **{name: lambda *_: 1 << 30 for name in used},
        "mem_get_info": lambda *_: (H100.total_memory, H100.total_memory),
        "memory_stats": lambda *_: {},
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
    }


def _inert_classes(synchronized: Callable[[str], None]) -> tuple[type, type]:
    """Return ``Stream`` and ``Event``, of which only ``synchronize`` has an effect."""

    class Inert:
        cuda_stream = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            self.device = torch.device("cuda", torch.cuda.current_device())

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Any) -> float:
            return 1.0

        def synchronize(self) -> None:
            synchronized(f"{type(self).__name__}.synchronize")

        def __getattr__(self, name: str) -> Callable[..., Any]:
            if name not in ("record", "record_event", "wait", "wait_event", "wait_stream"):
                raise AttributeError(name)
            return lambda *_, **__: None

    return type("Stream", (Inert,), {}), type("Event", (Inert,), {})


def _replace_generators() -> None:
    """Use one CPU generator per device."""
    generators = tuple(torch.Generator() for _ in range(DEVICES))

    def own(device: Any = None) -> torch.Generator:
        return generators[torch.cuda.current_device() if device is None else _index(device)]

    def set_state(state: Tensor, device: Any = None) -> None:
        own(device).set_state(state)

    def seed_all(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    cuda: Any = torch.cuda
    cuda.default_generators = generators
    for module in (cuda, cuda.random):
        module.manual_seed = lambda seed: own().manual_seed(seed)
        module.manual_seed_all = seed_all
        module.get_rng_state = lambda device=None: own(device).get_state()
        module.set_rng_state = set_state
        module.initial_seed = lambda: own().initial_seed()


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Convert a module as ``Module._apply`` does, with the same parameter objects afterwards.

    torch swaps fake parameters with their converted copies, which fails for those that others
    refer to.
    """
    for child in module.children() if recurse else ():
        child._apply(function)
    for parameter in filter(lambda p: p is not None, module._parameters.values()):
        with torch.no_grad():
            converted: Any = function(parameter)  # type: ignore[arg-type]
        parameter.data = converted  # type: ignore[union-attr]
        parameter.fake_device = converted.fake_device  # type: ignore[union-attr]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
