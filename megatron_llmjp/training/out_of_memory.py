"""Report of a rank that runs out of memory: use by kind, and the largest tensors with their names.

The tensors are those that Python objects refer to: parameters, gradients, optimizer state, and
others that are alive in the failed step. The latter are named by the local variable of a function
that failed, or else by the operation that computed them. Tensors that only autograd's graph holds,
most of the activations, have no Python object; they are the rest of the allocated memory.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llmjp.filesystem import warn
from megatron_llmjp.formatting import format_bytes, format_table
from megatron_llmjp.parallel.device import Device

LARGEST = 10
"""Number of tensors that are listed."""
PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer state"
OTHERS = "activations and others"
MESSAGES = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of messages of failed allocations that are not a ``torch.OutOfMemoryError``."""
REMEDY = (
    "reduce --micro-batch-size, pass --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1, or split the model further (--sequence-parallel, "
    "--tensor-model-parallel-size, --pipeline-model-parallel-size); --estimate shows the memory of "
    "a layout"
)


@dataclass(frozen=True)
class NamedMemory:
    """Memory of a tensor, or of several that share it."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    """In bytes."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation: of a tensor, or by a library on the GPU."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(part in text for part in MESSAGES)


@contextmanager
def explain_out_of_memory(
    chunks: Sequence[Any], optimizer: Any, device: Device, rank: int, folder: Path | None
) -> Iterator[None]:
    """Report the use of memory if the block runs out of it, and raise the error again.

    Args:
        chunks: model chunks of this rank.
        optimizer: megatron-core's optimizer; None before it is built.
        device: the device of this rank.
        rank: rank of this process.
        folder: folder that the report is written to as well; None for none.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            # The frames of the error keep the tensors of the failed step alive until here.
            try:
                found = find_memory(chunks, optimizer, device, local_variables(error, device))
                _report(found, device, rank, folder)
            except Exception as failure:  # the error itself is raised in any case
                warn(f"no report on the memory of rank {rank}: {failure}")
        raise


def _report(found: Sequence[NamedMemory], device: Device, rank: int, folder: Path | None) -> None:
    lines = describe_memory(found, device.memory().get("memory allocated bytes"))
    text = "\n".join([f"error: rank {rank} is out of memory on {device.name}", *lines])
    print(f"{text}\n{REMEDY}", file=sys.stderr, flush=True)
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"out-of-memory-rank{rank}.txt").write_text(f"{text}\n")
    except OSError as error:
        warn(f"{folder}: the report on memory was not written: {error}")


def describe_memory(found: Sequence[NamedMemory], allocated: float | None) -> list[str]:
    """Return lines with the memory by kind and the largest tensors.

    Args:
        found: memory of all tensors, each storage once.
        allocated: allocated bytes of the device; None if not known.
    """
    sums: dict[str, int] = defaultdict(int)
    for each in found:
        sums[each.kind] += each.size
    if allocated is not None:
        sums["held by autograd and libraries"] = max(0, int(allocated) - sum(sums.values()))
    by_kind = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in sums.items())
    largest = sorted(found, key=lambda each: each.size, reverse=True)[:LARGEST]
    rows = [
        (format_bytes(e.size), e.dtype, " x ".join(map(str, e.shape)), f"{e.kind}: {e.name}")
        for e in largest
    ]
    return [f"memory: {by_kind}", "largest tensors:", format_table(rows, right={0})]


def local_variables(error: BaseException, device: Device) -> dict[int, str]:
    """Return names of the tensors in the frames of an error, by storage; inner frames first."""
    names: dict[int, str] = {}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        function = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # Python 3.10
        for name, value in frame.f_locals.items():
            if issubclass(type(value), Tensor) and _is_counted(value, device):
                names.setdefault(value.untyped_storage()._cdata, f"{name} in {function}")
    return names


def find_memory(
    chunks: Sequence[Any], optimizer: Any, device: Device, names: Mapping[int, str]
) -> list[NamedMemory]:
    """Return the memory of the tensors on the device of this rank.

    Parameters, gradients and optimizer state may be parts of larger buffers; of all other tensors
    each storage is counted once.

    Args:
        chunks: model chunks of this rank.
        optimizer: megatron-core's optimizer; None before it is built.
        device: the device of this rank.
        names: names of other tensors, by storage.
    """
    found, storages = [], {}
    for kind, name, tensor in _own_tensors(chunks, optimizer):
        part = (tensor.untyped_storage()._cdata, tensor.storage_offset())
        if tensor.device.type == device.kind and part not in storages:
            storages[part] = part[0]
            found.append(_named(kind, name, tensor, tensor.numel() * tensor.element_size()))
    seen = set(storages.values())
    for tensor in _living_tensors():
        if _is_counted(tensor, device):
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                name = names.get(storage._cdata) or _operation(tensor)
                found.append(_named(OTHERS, name, tensor, storage.nbytes()))
    return found


def _is_counted(tensor: Tensor, device: Device) -> bool:
    return tensor.device.type == device.kind and tensor.layout is torch.strided


def _operation(tensor: Tensor) -> str:
    """Return what computed a tensor, from autograd; its type if autograd does not know it."""
    computed_by = tensor.grad_fn
    return f"output of {computed_by.name()}" if computed_by is not None else type(tensor).__name__


def _named(kind: str, name: str, tensor: Tensor, size: int) -> NamedMemory:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return NamedMemory(kind, name, tuple(tensor.shape), dtype, size)


def _own_tensors(chunks: Sequence[Any], optimizer: Any) -> Iterator[tuple[str, str, Tensor]]:
    """Yield kind, name and tensor of parameters, gradients and optimizer state."""
    for number, chunk in enumerate(chunks):
        of_chunk = f" of chunk {number}" if len(chunks) > 1 else ""
        for name, parameter in chunk.named_parameters():
            name = f"{name.replace('module.', '')}{of_chunk}"
            yield PARAMETERS, name, parameter
            gradient = getattr(parameter, "main_grad", parameter.grad)
            if gradient is not None:
                yield GRADIENTS, name, gradient
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts if optimizer is not None else ():
        state = part.optimizer.state if part.optimizer is not None else {}
        weights = [p for group in part.param_groups for p in group["params"]]
        # The distributed optimizer holds parts of tensors, without names.
        for number, main in enumerate(weights):
            yield OPTIMIZER, f"main weights {number}", main
            for name, value in state.get(main, {}).items():
                if isinstance(value, Tensor):
                    yield OPTIMIZER, f"{name} {number}", value


def _living_tensors() -> Iterator[Tensor]:
    """Yield all tensors that Python objects refer to."""
    for thing in gc.get_objects():
        # type() and not isinstance(): proxies of other libraries may run code.
        if issubclass(type(thing), Tensor):
            yield thing
