"""Replacement of megatron-core's norm and scaling of many tensors, without TE and Apex.

What: ``l2_norm_impl`` of ``megatron.core.optimizer.clip_grads`` and ``multi_tensor_scale_impl`` of
that module and of ``megatron.core.optimizer.optimizer``.

Why: megatron-core's own norm copies the norm of each tensor to the host and the result back to the
GPU: one wait for the GPU per gradient in every step. Its scaling starts two kernels per tensor.
torch's foreach kernels compute the same without a wait and with few kernels.

Remove when ``local_multi_tensor_l2_norm`` reads no values, which meta tensors do not have. Not the
case in megatron-core 0.16.1.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as core_optimizer
from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm
from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron_llmjp.patches.torch_cuda_on_cpu import is_substituted


def use_foreach_kernels() -> None:
    """Make megatron-core compute gradient norms and clip gradients by torch's foreach kernels.

    Does nothing where Transformer Engine or Apex is installed, whose kernels are used then, except
    on a CPU: their kernels need a GPU.
    """
    if clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm and not is_substituted():
        return
    for module in (clip_grads, core_optimizer):
        module.multi_tensor_applier = local_multi_tensor_applier
    clip_grads.l2_norm_impl = l2_norm
    for module in (clip_grads, core_optimizer):
        module.multi_tensor_scale_impl = scale


def l2_norm(
    chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    """Return the L2 norm of all tensors as a tensor of shape ``[1]`` on their device."""
    return get_total_norm(lists[0]).view(1), None


def scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Write the first list times a factor to the second one, which may be the same list."""
    source, target = lists
    if source is target:  # in place: a copy of all gradients may not fit into memory
        torch._foreach_mul_(target, factor)
    elif factor == 1.0:
        torch._foreach_copy_(target, source)
    else:
        torch._foreach_copy_(target, torch._foreach_mul(source, factor))
