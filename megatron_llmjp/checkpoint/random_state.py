"""The random state of one rank, as plain data that loads without unpickling code."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from megatron_llmjp.runtime.device import without_warnings

with without_warnings():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker


def get_random_state() -> dict[str, Any]:
    """All generators that training draws from."""
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = legacy
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators where :func:`get_random_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
