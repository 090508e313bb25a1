"""Recomputation of norms without Transformer Engine.

What: ``CheckpointWithoutOutput`` of megatron-core is created with ``fp8=None`` unless a precision
is given.

Why: transformer layers recompute their norms (``recompute_modules`` with ``layernorm``) by
``CheckpointWithoutOutput()``, whose default ``fp8=False`` counts as fp8, because the class compares
it with None. It then calls Transformer Engine, and without it ends with a NameError.

Remove when the default is None. Not the case in megatron-core 0.16.1.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

_REPLACED: list[Any] = []  # the original constructor


def recompute_norms_without_fp8() -> None:
    """Let norms be recomputed without Transformer Engine. Calling it again does nothing."""
    if not _REPLACED:
        checkpoint: Any = CheckpointWithoutOutput
        _REPLACED.append(checkpoint.__init__)
        checkpoint.__init__ = _initialize


def _initialize(self: Any, fp8: Any = None) -> None:
    _REPLACED[0](self, fp8=fp8 or None)
