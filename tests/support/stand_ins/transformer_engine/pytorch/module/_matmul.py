"""Matrix multiplication of the linear layers; not a module of the original."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine._device import require_gpu
from transformer_engine.pytorch.module.base import get_dummy_wgrad


def split(parameter: nn.Parameter, dim: int) -> None:
    """Mark a parameter as a slice of a tensor that is split over tensor-parallel ranks."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim, parameter.partition_stride = dim, 1  # type: ignore[attr-defined]


class MatMul(torch.autograd.Function):
    """``x W^T``; with ``fuse`` the gradient of W is accumulated in ``W.main_grad``.

    In the first micro-batch it overwrites ``main_grad``, as in Transformer Engine.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, fuse: bool, is_first_microbatch: bool | None
    ) -> Tensor:
        require_gpu()
        ctx.save_for_backward(x)
        ctx.weight, ctx.fuse, ctx.first = weight, fuse, is_first_microbatch
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        of_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        if ctx.fuse:
            if ctx.first:
                weight.main_grad.copy_(of_weight)
            else:
                weight.main_grad.add_(of_weight)
            if hasattr(weight, "grad_added_to_main_grad"):
                weight.grad_added_to_main_grad = True
                of_weight = get_dummy_wgrad(list(weight.shape), weight.dtype)
            else:
                of_weight = None
        return grad @ weight, of_weight, None, None
