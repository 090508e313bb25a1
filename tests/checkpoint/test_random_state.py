"""Random states in checkpoints: plain data that restores every generator."""

from __future__ import annotations

import io
import random
from typing import Any
from unittest import mock

from tests.support.processes import run_ranks


def draws_around_a_load() -> list[list[float]]:
    """Return draws of all generators after a save, and after loading it again."""
    import numpy as np
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_llmjp.checkpoint.sharded_state import get_random_state, set_random_state
    from megatron_llmjp.parallel.device import setup

    def draw() -> list[float]:
        with get_cuda_rng_tracker().fork("own"):
            forked = torch.rand(1)
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal()]
        return [*numbers, float(torch.rand(1)), float(forked)]

    setup()
    get_cuda_rng_tracker().add("own", 5)
    draw()  # leaves a second normal number in two of the generators
    saved: Any = io.BytesIO()
    # The GPU's generator is the CPU's here: setting it would hide that the CPU's is not set.
    gpu: list[int] = []
    with mock.patch.object(torch.cuda, "get_rng_state", lambda: 17):
        torch.save(get_random_state(), saved)
    expected = draw()
    draw()
    saved.seek(0)
    with mock.patch.object(torch.cuda, "set_rng_state", gpu.append):
        set_random_state(torch.load(saved, weights_only=True))
    assert gpu == [17]
    return [expected, draw(), draw()]


def test_every_generator_is_restored():
    ((expected, found, later),) = run_ranks(draws_around_a_load, 1)
    assert found == expected
    assert all(a != b for a, b in zip(expected, later, strict=True))
