"""AdamW where neither Transformer Engine nor Apex has a fused one.

torch's AdamW keeps a ``step`` per parameter, which megatron-core's distributed optimizer cannot
restore: it loads one tensor into all parameters, and the bias correction runs ahead from then on.
Here ``step`` is a number of the parameter group, as in Apex's FusedAdam, and torch's fused kernel
updates all tensors of a group in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter, 2019) on torch's fused kernel."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is implemented")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel() > 0:
                    key = (parameter.device, parameter.dtype)
                    by_device.setdefault(key, []).append(parameter)
            for (device, _), parameters in by_device.items():
                self._update(group, parameters, device)

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], device: torch.device
    ) -> None:
        states = [self._state(parameter) for parameter in parameters]
        step = torch.tensor(float(group["step"]), device=device)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [step] * len(parameters),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
