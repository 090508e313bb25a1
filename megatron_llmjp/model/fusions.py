"""Availability of ``torch.compile``, which fuses element-wise operations on a GPU.

Activation functions, dropout with the residual, the rotary embedding without Transformer Engine,
and the losses are compiled. That requires Triton, a C compiler and Python's headers at run time,
which a compute node may lack.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor


@cache
def compiler_error() -> str:
    """Compile a function for the current GPU; return the error, or nothing.

    Functions are compiled in this process: a pool of worker processes on each rank, torch's
    default, does not pay off for a few small functions.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        torch.compile(_add_one, dynamic=False)(torch.zeros(1, device=torch.cuda.current_device()))
    except Exception as error:  # of torch, Triton or the C compiler
        cause = getattr(error, "inner_exception", error)
        return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
    return ""


def _add_one(x: Tensor) -> Tensor:
    return x + 1
