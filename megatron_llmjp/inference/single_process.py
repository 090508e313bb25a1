"""Process groups of a single process, which megatron-core's modules require, for programs that do
not train.

All models of a process share them.
"""

from __future__ import annotations

import atexit
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.parallel import process_groups
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.parallel.ranks import single_process


def join_single_process(config: Config, device: Device) -> None:
    """Initialize the process groups of one process, unless they exist; destroy them at exit.

    Args:
        config: of a model in one process.
        device: device of this process.

    Raises:
        UserError: this process already is one of several ranks.
    """
    if parallel_state.model_parallel_is_initialized():
        if dist.get_world_size() == 1:
            return
        raise UserError(
            "a model is loaded in one process, but this process is one of "
            f"{dist.get_world_size()} ranks of a training run: load it in another process"
        )
    if dist.is_initialized():
        raise UserError(
            "torch.distributed is already initialized in this process by another library: load "
            "the model before, or in another process"
        )
    process_groups.initialize(config, single_process(), device)
    atexit.register(process_groups.destroy)


@contextmanager
def single_process_groups(config: Config, device: Device) -> Iterator[None]:
    """Have the process groups of one process in the block, and destroy those that it created.

    Args:
        config: of a model in one process.
        device: device of this process.

    Raises:
        UserError: this process already is one of several ranks.
    """
    existed = parallel_state.model_parallel_is_initialized()
    join_single_process(config, device)
    try:
        yield
    finally:
        if not existed:
            process_groups.destroy()
            atexit.unregister(process_groups.destroy)


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch after the block."""
    python, numpy, generator = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(generator)
