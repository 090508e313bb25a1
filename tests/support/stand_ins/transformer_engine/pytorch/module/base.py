"""Base of the layers: extra state and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """Return the gradient of a weight whose gradient was already accumulated: not to be used."""
    device = torch.cuda.current_device()
    return torch.full(shape, 0.0 if zero else float("nan"), dtype=dtype, device=device)


class TransformerEngineBaseModule(nn.Module):
    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0, "quantization is not part of the stand-in"

    def add_parameter(
        self, name: str, shape: list[int], initialize: Callable[[Tensor], Any], **factory: Any
    ) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(shape, **factory))
        self.register_parameter(name, parameter)
        with torch.no_grad():
            initialize(parameter)
        return parameter
