"""The device of a process: CUDA, or the CPU in its place; deterministic kernels.

Bit-identical numbers from run to run.

The device: CUDA, or a CPU that stands in for it. The only file that patches ``torch.cuda``.

megatron-core calls ``torch.cuda`` and writes ``device="cuda"`` all over. On a machine without a
GPU those calls are made to mean the CPU, so that the very same training code runs there over
gloo. On CUDA nothing is patched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import deterministic

_ENVIRONMENT = {
    # cuBLAS keeps to one workspace, and so to one order of sums.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Transformer Engine's attention leaves its atomic additions.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # NCCL adds up in one order; the choice by message size and load is off.
    "NCCL_ALGO": "Ring",
}


def be_deterministic(wanted: bool) -> None:
    """Have torch, Transformer Engine, cuBLAS and NCCL compute in one order, or as they like.

    To be called before the first kernel and process group. What the user has set in the environment
    stays. On a CPU the numbers are the same without it; on a GPU it costs speed: attention's
    backward pass and scatters take slower kernels, NCCL one algorithm for every size.
    """
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        # Filling new memory with NaN only helps to find bugs.
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Device:
    """What the rest of the system needs to know of the device."""

    kind: str
    """``cuda`` or ``cpu``."""
    backend: str
    """Backend of torch.distributed."""
    name: str
    """For people."""

    @property
    def is_cuda(self) -> bool:
        """Whether kernels run asynchronously on a GPU."""
        return self.kind == "cuda"

    @property
    def torch(self) -> torch.device:
        """The device of this process."""
        return torch.device("cuda", torch.cuda.current_device()) if self.is_cuda else _CPU

    def memory(self) -> dict[str, float]:
        """Bytes that this process holds, by what they are; on a CPU its largest resident size."""
        if not self.is_cuda:
            unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return {"memory peak bytes": float(peak)}
        return {
            "memory peak bytes": float(torch.cuda.max_memory_allocated()),
            "memory allocated bytes": float(torch.cuda.memory_allocated()),
            "memory reserved bytes": float(torch.cuda.memory_reserved()),
        }


def setup(local_rank: int = 0) -> Device:
    """Choose the device of this process; on a CPU machine, put the substitution in place."""
    if torch.cuda.is_available() and not _substituted():
        # Kernels must start in the order they are issued, or communication does not overlap.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return Device("cuda", "nccl", torch.cuda.get_device_name())
    _substitute()
    return Device("cpu", "gloo", f"CPU, {torch.get_num_threads()} thread(s) per rank")


_CPU = torch.device("cpu")
_ACTIVE: list[TorchFunctionMode] = []  # at most one: the mode must live as long as the process


def _substituted() -> bool:
    return bool(_ACTIVE)


def _substitute() -> None:
    """Make megatron-core's CUDA calls mean CPU. Calling it again does nothing."""
    if _substituted():
        return
    mode = _CudaMeansCpu()
    mode.__enter__()
    _ACTIVE.append(mode)
    _replace_calls()
    _replace_random_state()


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in every torch call, as ``torch.set_default_device`` does."""

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
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Inert:
    """Stands in for streams, events and contexts: everything is in order on a CPU already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _returning(None)


def _returning(value: Any) -> Callable[..., Any]:
    """A function that ignores its arguments; a new one each time, as torch._dynamo demands."""

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
    """One generator, the CPU's, serves as megatron-core's CUDA generator."""
    cuda: Any = torch.cuda
    with without_warnings(), _without_compiler():
        from megatron.core.tensor_parallel import random
    core: Any = random
    for module in (cuda, cuda.random):
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # It warns when the CPU's generator moves where only the GPU's should; here they are one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    core._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    core._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """megatron-core wraps its fused functions in torch.compile as it is imported.

    They are for a GPU; on a CPU machine that only costs seconds at every start.
    """
    library: Any = torch
    compiler = library.compile
    library.compile = lambda function=None, **_: function
    try:
        yield
    finally:
        library.compile = compiler


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """megatron-core warns of everything optional that is absent; we print what we chose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
