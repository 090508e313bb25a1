"""The norm of all parameters."""

from __future__ import annotations

from typing import Any

import torch

from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared


@torch.no_grad()
def parameter_norm(optimizer: Any) -> float:
    """L2 norm of the fp32 parameters that the optimizer updates; all ranks call it.

    Each rank sums what it owns, and megatron-core adds up over the same ranks as for the gradient
    norm: tied embeddings and what tensor-parallel ranks share count once, the distributed
    optimizer's shards all together.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    owned = [
        parameter.detach()
        for part in parts
        for parameter in part.get_parameters()
        if parameter.numel() > 0
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter)
    ]
    return float(get_grad_norm_fp32(owned, 2, optimizer.get_grad_stats_parallel_group()))
