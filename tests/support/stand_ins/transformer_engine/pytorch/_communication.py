"""Communication of tensor-parallel layers; not a module of the original."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _sum(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _own(x: Tensor, group: Any) -> Tensor:
    return x.chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()


def _all(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


class _Communication(torch.autograd.Function):
    """One exchange in the forward pass and the opposite one in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, there: Any, back: Any) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None


def copy(x: Tensor, group: Any) -> Tensor:
    """Use an input on all ranks: the gradients are summed."""
    return _Communication.apply(x, group, lambda x, _: x.view_as(x), _sum)


def reduce(x: Tensor, group: Any) -> Tensor:
    """Sum the outputs of all ranks."""
    return _Communication.apply(x, group, _sum, lambda x, _: x)


def gather(x: Tensor, group: Any) -> Tensor:
    """Concatenate the parts of a sequence ``[s/t, ...]``."""
    return _Communication.apply(x, group, _all, lambda x, group: _own(_sum(x, group), group))


def scatter(x: Tensor, group: Any) -> Tensor:
    """Sum the outputs of all ranks, and keep this rank's part of the sequence."""
    return _Communication.apply(x, group, lambda x, group: _own(_sum(x, group), group), _all)
