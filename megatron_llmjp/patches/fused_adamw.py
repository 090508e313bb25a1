"""Replacement of torch's AdamW in megatron-core's optimizers, without Transformer Engine and Apex.

What: ``Adam`` of ``megatron.core.optimizer`` and its ``distrib_optimizer`` becomes
:class:`FusedAdamW`, and their flags are set as for Apex's FusedAdam.

Why: torch's AdamW keeps one ``step`` tensor per parameter. On load, the distributed optimizer
assigns one shared tensor to all parameters; each update then increments it once per parameter, and
the bias correction is wrong from there on. :class:`FusedAdamW` keeps ``step`` in the parameter
group, as Apex does, and updates all tensors of a group in one call of torch's fused kernel.

Remove when a loaded distributed optimizer with ``torch.optim.AdamW`` counts steps correctly
(``DistributedOptimizer.load_state_dict``). Not the case in megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from megatron_llmjp.patches.torch_cuda_on_cpu import is_substituted


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
        # Filled on the device: a copy of a host value would make the host wait.
        step = torch.full((), float(group["step"]), device=device)
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


def register_fused_adamw() -> None:
    """Make megatron-core use :class:`FusedAdamW` in place of Apex's FusedAdam.

    Does nothing where Transformer Engine or Apex is installed, except on a CPU: their kernels need
    a GPU.
    """
    if not core_optimizer.USING_PYTORCH_OPTIMIZER and not is_substituted():
        return
    for module in (core_optimizer, distrib_optimizer):
        module.Adam = FusedAdamW
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
