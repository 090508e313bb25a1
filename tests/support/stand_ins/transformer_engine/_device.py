"""The device that kernels need; not a module of the original."""

import torch

import transformer_engine


def require_gpu() -> None:
    if not transformer_engine.has_gpu and not torch.cuda.is_available():
        raise RuntimeError("no GPU: the kernels of Transformer Engine do not run here")
