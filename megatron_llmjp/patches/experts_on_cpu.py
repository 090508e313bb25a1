"""Replacements in megatron-core's experts that are needed on a CPU, or without Transformer Engine.

What: ``te_general_gemm`` of ``megatron.core.transformer.moe.moe_utils``, set to None, with which
the router multiplies by ``torch.mm``; and ``maybe_move_tensor_to_cpu`` of
``megatron.core.transformer.moe.token_dispatcher`` on a CPU.

Why: ``moe_utils`` imports the name in a ``try`` without a fallback, and without Transformer Engine
the first forward pass of a router ends with a NameError. ``maybe_move_tensor_to_cpu`` makes numpy
arrays of the splits of an all-to-all only if they are on a GPU; torch refuses tensors as splits.

Remove when the import has a fallback, and splits on a CPU are lists. Not the case in megatron-core
0.16.1.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from megatron_llmjp.patches.torch_cuda_on_cpu import is_substituted


def support_experts_on_cpu() -> None:
    """Make megatron-core's experts run on this machine. Calling it again does nothing."""
    if is_substituted() or not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if is_substituted():
        token_dispatcher.maybe_move_tensor_to_cpu = _on_cpu


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return a tensor that is on the CPU already, or the numpy array of it."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
