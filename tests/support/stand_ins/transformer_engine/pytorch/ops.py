"""Norms, which Transformer Engine implements as fusible operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicOperation(nn.Module):
    """An operation with an extra state, which is empty without quantization."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0, "quantization is not part of the stand-in"

    def forward(self, input: Tensor, *extra_inputs: Tensor, **kwargs: Any) -> Tensor:
        assert not extra_inputs and not kwargs
        return self.compute(input)


class _Norm(BasicOperation):
    def __init__(
        self, shape: Iterable[int] | int, eps: float, zero_centered_gamma: bool, **factory: Any
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma, "not part of the stand-in"
        self.eps, self.shape = eps, (shape,) if isinstance(shape, int) else tuple(shape)
        self.weight = nn.Parameter(torch.ones(self.shape, **factory))


class LayerNorm(_Norm):
    def __init__(
        self,
        normalized_shape: Iterable[int] | int,
        *,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        sm_margin: int = 0,
    ) -> None:
        super().__init__(normalized_shape, eps, zero_centered_gamma, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(self.shape, device=device, dtype=dtype))

    def compute(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class RMSNorm(_Norm):
    def __init__(
        self,
        normalized_shape: Iterable[int] | int,
        *,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        sm_margin: int = 0,
    ) -> None:
        super().__init__(normalized_shape, eps, zero_centered_gamma, device=device, dtype=dtype)

    def compute(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class Sequential(nn.Module):
    """For annotations only."""


class FusibleOperation(nn.Module):
    """For annotations only."""
