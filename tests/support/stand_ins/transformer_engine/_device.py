"""The device that kernels need; not a module of the original."""

import transformer_engine


def require_gpu() -> None:
    if not transformer_engine.has_gpu:
        raise RuntimeError("no GPU: the kernels of Transformer Engine do not run here")
