"""Replacements in megatron-core's experts that are needed on a CPU, or without Transformer Engine.

What: ``te_general_gemm`` of ``megatron.core.transformer.moe.moe_utils``, set to None, with which
the router multiplies by ``torch.mm``; and, on a CPU, ``maybe_move_tensor_to_cpu`` of
``megatron.core.transformer.moe.token_dispatcher``, and ``_gather_along_first_dim`` and
``_reduce_scatter_along_first_dim`` of ``megatron.core.tensor_parallel.mappings`` for parts of
different sizes.

Why: ``moe_utils`` imports the name in a ``try`` without a fallback, and without Transformer Engine
the first forward pass of a router ends with a NameError. ``maybe_move_tensor_to_cpu`` makes numpy
arrays of the splits of an all-to-all only if they are on a GPU; torch refuses tensors as splits.
Tensor parallel ranks that share experts gather their tokens, whose numbers differ; gloo has no
all-gather and no reduce-scatter of parts of different sizes.

Remove when the import has a fallback, splits on a CPU are lists, and gloo accepts such parts. Not
the case in megatron-core 0.16.1 with torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor

from megatron_llmjp.patches.torch_cuda_on_cpu import is_substituted


def support_experts_on_cpu() -> None:
    """Make megatron-core's experts run on this machine. Calling it again does nothing."""
    if is_substituted() or not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if is_substituted() and token_dispatcher.maybe_move_tensor_to_cpu is not _on_cpu:
        core: Any = mappings
        core._gather_along_first_dim = _gather_of(core._gather_along_first_dim)
        core._reduce_scatter_along_first_dim = _reduce_of(core._reduce_scatter_along_first_dim)
        token_dispatcher.maybe_move_tensor_to_cpu = _on_cpu


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return a tensor that is on the CPU already, or the numpy array of it."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_of(equal: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an all-gather along the first dimension; ``equal`` is the one of equal parts."""

    def gather(
        tensor: Tensor, group: Any, sizes: Sequence[int] | None = None, *rest: Any
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return equal(tensor, group, sizes, *rest)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather


def _reduce_of(equal: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a reduce-scatter along the first dimension; ``equal`` is the one of equal parts."""

    def reduce(
        tensor: Tensor, group: Any, sizes: Sequence[int] | None = None, *rest: Any
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return equal(tensor, group, sizes, *rest)
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total.split(list(sizes))[group.rank()].clone()

    return reduce
