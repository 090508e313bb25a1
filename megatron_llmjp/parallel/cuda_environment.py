"""Environment variables that the CUDA driver reads once, when it is initialized. Without torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_DRIVER_VARIABLES = {
    # Up to Hopper, communication of tensor and sequence parallelism overlaps with computation only
    # if kernels start in the order of their launches. Blackwell needs no limit (Megatron-LM's
    # validate_args); an exported value, also an empty one, is kept.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def set_driver_variables(env: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that are not set yet.

    Call it before the first CUDA call of the process: ``torch.cuda.is_available`` is one.
    """
    for name, value in _DRIVER_VARIABLES.items():
        env.setdefault(name, value)
