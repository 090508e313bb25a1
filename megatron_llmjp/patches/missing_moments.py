"""Fix of saving a distributed optimizer that has not taken a step.

What: ``get_parameter_state_dp_zero`` of one ``DistributedOptimizer``.

Why: it reads ``exp_avg`` and ``exp_avg_sq`` of every parameter, which do not exist before the first
step. A run in fp16 may save before that, as the loss scaler can skip its first steps.

Remove when the state of an optimizer without a step can be saved without it. Not the case in
megatron-core 0.16.1.
"""

from __future__ import annotations

from typing import Any

import torch


def create_missing_moments(optimizer: Any) -> None:
    """Create the moments that are absent whenever the distributed optimizer gathers its state."""
    gather = optimizer.get_parameter_state_dp_zero

    def with_moments(*arguments: Any, **options: Any) -> Any:
        _create_moments(optimizer.optimizer)
        return gather(*arguments, **options)

    optimizer.get_parameter_state_dp_zero = with_moments


def _create_moments(adam: Any) -> None:
    """Set the moments that a parameter lacks to zero, as its first step would."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if parameter.numel() > 0 and name not in state:
                    state[name] = torch.zeros_like(parameter)
