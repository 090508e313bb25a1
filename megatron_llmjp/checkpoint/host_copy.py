"""Copies of tensors in page-locked host memory, made while training continues.

The copies of an asynchronous save run on a CUDA stream of their own, so that they overlap with the
next forward and backward pass. Only the optimizer overwrites what is saved, so its next update
waits for the copies, on the device: the host submits work without waiting. The threads that write
the files wait for the copies on the host.

On a CPU the streams are inert (``patches/torch_cuda_on_cpu.py``), and a copy is complete when
``copy`` returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class HostBuffers:
    """Host memory for the copies of a rank, reused by consecutive saves.

    Copying to memory that the process has used before is several times faster than to new memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._stream: Any = None
        self._copied: Any = None
        self._sources: list[Tensor] = []

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Start the copies within this context once the work submitted so far is done."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        self._copied = torch.cuda.Event()
        self._copied.record(self._stream)

    def copy(self, key: tuple[Any, ...], tensor: Tensor) -> Tensor:
        """Start to copy a tensor to its buffer, and return the buffer."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = _empty_on_host(tensor)
            self._buffers[key] = buffer
        buffer.copy_(tensor, non_blocking=True)
        self._sources.append(tensor)  # the memory of a temporary one must not be reused yet
        return buffer

    def hold_device(self) -> None:
        """Let work that is submitted from now on wait for the copies; the host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Wait on the host until all copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()
        self._sources.clear()


def compact_on_host(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU with a storage of its size: torch.save writes full storages.

    A tensor on a GPU is copied through page-locked memory, which torch keeps for later copies.
    """
    tensor = tensor.detach()
    if tensor.is_cuda:
        found = _empty_on_host(tensor)
        found.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        return found
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _empty_on_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
