"""Replacement of ``torch.cuda`` on machines without a GPU, so that megatron-core runs on a CPU.

What: the functions of ``torch.cuda`` that megatron-core calls, ``device="cuda"`` in every torch
call and pinned memory (by a ``TorchFunctionMode``), megatron-core's access to the CUDA generator,
and, during its import, ``torch.compile``. With a CUDA build of torch, Transformer Engine and Apex
are hidden, whose kernels megatron-core would call with CPU tensors. Nothing is replaced where the
run uses CUDA.

Why: megatron-core calls ``torch.cuda`` and passes ``device="cuda"`` in all of its modules. With the
replacement the same training code runs on a CPU over gloo.

Remove when megatron-core takes the device as a parameter: ``model_parallel_cuda_manual_seed`` and
``GPTModel`` must work without CUDA. Not the case in megatron-core 0.16.1 with torch 2.13.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_GPU_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
_ACTIVE: list[TorchFunctionMode] = []  # at most one: the mode must live as long as the process


def is_substituted() -> bool:
    """Whether ``torch.cuda`` is replaced in this process."""
    return bool(_ACTIVE)


def substitute_cpu_for_cuda() -> None:
    """Make torch's CUDA calls use the CPU. Calling it again does nothing."""
    if is_substituted():
        return
    _hide_gpu_packages()
    mode = _CudaMeansCpu()
    mode.__enter__()
    _ACTIVE.append(mode)
    _replace_calls()
    _replace_random_state()


def _hide_gpu_packages() -> None:
    """Make imports of packages with CUDA kernels fail, as if they were not installed.

    On a CPU build of torch they cannot be installed.
    """
    if torch.version.cuda is not None:
        for name in _GPU_PACKAGES:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces CUDA devices in every torch call, as ``torch.set_default_device`` does."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Compared with strings such as 'torch.cuda.FloatTensor' in megatron-core's optimizer.
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Inert:
    """Replaces streams, events and device contexts: operations on a CPU are synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def record_event(self, *args: Any, **kwargs: Any) -> _Inert:
        """Return an event that needs no wait."""
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _returning(None)


def _returning(value: Any) -> Callable[..., Any]:
    """Return a new function that ignores its arguments; torch._dynamo rejects shared ones."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return value

    return function


@contextlib.contextmanager
def _unchanged(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _replace_calls() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = _returning(_CPU)
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _returning(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, _returning(0))
    for name in ("Stream", "Event", "device"):
        setattr(cuda, name, _Inert)
    cuda.stream = _unchanged
    cuda.current_stream = _returning(_Inert())
    cuda.default_stream = _returning(_Inert())
    cuda.nvtx.range_push = _returning(None)
    cuda.nvtx.range_pop = _returning(None)


def _replace_random_state() -> None:
    """Use the CPU's generator wherever torch and megatron-core use the CUDA generator."""
    cuda: Any = torch.cuda
    with without_compiler():
        from megatron.core.tensor_parallel import random
    core: Any = random
    for module in (cuda, cuda.random):
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # It warns when the CPU's generator changes where only the GPU's should; here they are the same.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    core._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    core._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Skip ``torch.compile`` while megatron-core is imported.

    megatron-core wraps its fused functions in it at import. The functions are for GPUs; on a CPU
    the compiler only adds seconds to every start.
    """
    library: Any = torch
    compiler = library.compile
    library.compile = lambda function=None, **_: function
    try:
        yield
    finally:
        library.compile = compiler
