"""Patches of megatron-core's optimizers, and the AdamW used without Transformer Engine and Apex.

AdamW where neither Transformer Engine nor Apex has a fused one.

torch's AdamW keeps a ``step`` per parameter, which megatron-core's distributed optimizer cannot
restore: it loads one tensor into all parameters, and the bias correction runs ahead from then on.
Here ``step`` is a number of the parameter group, as in Apex's FusedAdam, and torch's fused kernel
updates all tensors of a group in one call.

Where megatron-core's optimizers are wrong, and how they are put right: the only place.

The tests of ``tests/checkpoint`` fail without each of these; a later megatron-core may need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_llmjp.parallel.device import without_warnings

with without_warnings():
    from megatron.core import optimizer as core_optimizer
    from megatron.core.optimizer import distrib_optimizer


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


def use_own_adamw() -> None:
    """Have megatron-core treat our AdamW as the fused one it expects from Apex.

    Does nothing where Transformer Engine or Apex is installed.
    """
    if not core_optimizer.USING_PYTORCH_OPTIMIZER:
        return
    for module in (core_optimizer, distrib_optimizer):
        module.Adam = FusedAdamW
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True


def save_padding(optimizer: Any) -> None:
    """Have a distributed optimizer save the state of every parameter from its own place.

    megatron-core 0.16 gathers the buckets of a buffer without the padding between them, and then
    looks for parameters at places that count it: after the first bucket with padding, all states
    in a ``fully_reshardable`` checkpoint are shifted. Buckets are padded to a multiple of 128 and
    of the data-parallel size.

    And it looks for moments that are not there before the first step, which fp16 may skip.
    """
    gather = optimizer.get_parameter_state_dp_zero

    def with_padding(*arguments: Any, **options: Any) -> Any:
        _complete_state(optimizer.optimizer)
        state = gather(*arguments, **options)
        if state is None:
            return None
        for index, buffer in enumerate(optimizer.buffers):
            for tensors in state[index].values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[key] = _spread(tensors[key], buffer)
        return state

    optimizer.get_parameter_state_dp_zero = with_padding


def _complete_state(adam: Any) -> None:
    """Give each parameter the moments that its first step would begin with."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if parameter.numel() > 0 and name not in state:
                    state[name] = torch.zeros_like(parameter)


def _spread(gathered: Tensor, buffer: Any) -> Tensor:
    """Buckets end to end -> buckets at their places in the buffer, with the padding."""
    spread = gathered.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        spread[bucket.offset : bucket.offset + end - start] = gathered[start:end]
        start = end
    return spread
