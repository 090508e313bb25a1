"""Where megatron-core's optimizers are wrong, and how they are put right: the only place.

The tests of ``tests/checkpoint`` fail without each of these; a later megatron-core may need none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_llmjp.runtime.device import without_warnings
from megatron_llmjp.training.adamw import FusedAdamW

with without_warnings():
    from megatron.core import optimizer as core_optimizer
    from megatron.core.optimizer import distrib_optimizer


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
