"""Bit-identical numbers from run to run."""

from __future__ import annotations

import os

import torch
from torch.utils import deterministic

_ENVIRONMENT = {
    # cuBLAS keeps to one workspace, and so to one order of sums.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Transformer Engine's attention leaves its atomic additions.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # NCCL adds up in one order; the choice by message size and load is off.
    "NCCL_ALGO": "Ring",
}


def be_deterministic(wanted: bool) -> None:
    """Have torch, Transformer Engine, cuBLAS and NCCL compute in one order, or as they like.

    To be called before the first kernel and process group. What the user has set in the environment
    stays. On a CPU the numbers are the same without it; on a GPU it costs speed: attention's
    backward pass and scatters take slower kernels, NCCL one algorithm for every size.
    """
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        # Filling new memory with NaN only helps to find bugs.
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
