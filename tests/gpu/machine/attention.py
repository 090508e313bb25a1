"""Attention kernels as an H100 would run them.

On devices without kernels torch decomposes attention into matrix products, whatever kernels are
enabled. Conditions: ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`` of torch 2.13; cuDNN's
kernel counts as flash attention, whose conditions are similar.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

_ATEN = torch.ops.aten
_FLASH_HEAD_SIZE = 256


def replace_attention(used: Callable[[str], None]) -> None:
    """Replace the function for the rest of this process.

    Args:
        used: called with ``flash``, ``efficient`` or ``math`` for each call on a GPU.
    """
    original = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        inputs: tuple[Any, ...] = (query, key, value)
        if query.is_cuda:
            assert attn_mask is None or not is_causal, "attn_mask and is_causal exclude each other"
            assert enable_gqa or query.shape[1] == key.shape[1], "needs enable_gqa"
            used(kernel := _choose(query, attn_mask, enable_gqa))
            if kernel == "flash":
                flash = _ATEN._scaled_dot_product_flash_attention
                return flash(*inputs, dropout_p, is_causal, scale=scale)[0]
            if kernel == "efficient":
                efficient = _ATEN._scaled_dot_product_efficient_attention
                return efficient(*inputs, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
        return original(
            *inputs, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    _record_documents(used)


def _record_documents(used: Callable[[str], None]) -> None:
    """Call ``used`` with ``documents`` for each call of torch's kernel for varied lengths."""
    original = varlen.varlen_attn

    @wraps(original)
    def varlen_attn(*args: Any, **kwargs: Any) -> Any:
        used("documents")
        return original(*args, **kwargs)

    varlen.varlen_attn = varlen_attn


def _choose(query: Tensor, mask: Tensor | None, groups: bool) -> str:
    """Return the first kernel that is enabled and supports the arguments.

    Raises:
        RuntimeError: there is none, as torch reports it.
    """
    enabled = torch.backends.cuda
    half = query.dtype in (torch.float16, torch.bfloat16)
    fits = mask is None and half and query.shape[-1] <= _FLASH_HEAD_SIZE
    if fits and (enabled.flash_sdp_enabled() or enabled.cudnn_sdp_enabled()):
        return "flash"
    if enabled.mem_efficient_sdp_enabled() and not groups:
        return "efficient"
    if enabled.math_sdp_enabled():
        return "math"
    raise RuntimeError("No available kernel. Aborting execution.")
