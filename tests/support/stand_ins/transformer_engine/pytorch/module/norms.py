"""Norm layers with the arguments of earlier releases, which megatron-core passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from transformer_engine.pytorch import ops


def _resolve(shape: Any, size: Any, dtype: torch.dtype | None, kwargs: dict[str, Any]) -> Any:
    if (shape is None) == (size is None):
        raise RuntimeError("either normalized_shape or hidden_size")
    if dtype is not None:
        kwargs["dtype"] = dtype
    return size if shape is None else shape


class LayerNorm(ops.LayerNorm):
    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        shape = _resolve(normalized_shape, hidden_size, params_dtype, kwargs)
        super().__init__(shape, eps=eps, zero_centered_gamma=zero_centered_gamma, **kwargs)
        if sequence_parallel is not None:
            self.weight.sequence_parallel = self.bias.sequence_parallel = sequence_parallel


class RMSNorm(ops.RMSNorm):
    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        shape = _resolve(normalized_shape, hidden_size, params_dtype, kwargs)
        super().__init__(shape, eps=eps, zero_centered_gamma=zero_centered_gamma, **kwargs)
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel
