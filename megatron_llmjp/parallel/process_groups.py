"""Process groups: initialization, random seeds, synchronization of ranks, shutdown.

A training collective times out after ``distributed_timeout_minutes``. After work whose duration
differs much between ranks, such as writing to a slow disk, ranks synchronize through
:class:`RankSync`, which has no timeout: the watchdog (``training/watchdog.py``) detects a rank that
hangs, by its heartbeats, and an exited rank closes its connections.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_llmjp.config.schema import Config
from megatron_llmjp.filesystem import no_heartbeat
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.parallel.ranks import Ranks
from megatron_llmjp.parallel.rendezvous import UNLIMITED, rendezvous
from megatron_llmjp.patches.gloo_threads import use_one_gloo_thread
from megatron_llmjp.patches.lazy_subgroups import without_communicator_splits


@dataclass(frozen=True)
class RankSync:
    """Heartbeats and synchronization of work whose duration differs between ranks."""

    beat: Callable[[], None] = no_heartbeat
    """Reports progress to the watchdog; called after each unit of work, from any thread."""
    group: Any = None
    """From :func:`new_group_without_timeout`; None for the default group, with its timeout."""

    def barrier(self) -> None:
        """Wait until every rank has called it; a collective."""
        dist.barrier(self.group)

    def run_on_first_rank(self, action: Callable[[], None]) -> None:
        """Run a function on rank 0 and raise its error on all ranks; a collective.

        Raises:
            Exception: the exception of ``action``.
        """
        failed: list[Exception | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except Exception as error:
                failed = [error]
        dist.broadcast_object_list(failed, src=0, group=self.group)
        if failed[0] is not None:
            raise failed[0]


DEFAULT_RANK_SYNC = RankSync()


def new_group_without_timeout() -> Any:
    """Create a gloo group of all ranks without a timeout."""
    with without_communicator_splits():
        return dist.new_group(backend="gloo", timeout=UNLIMITED)


def initialize(config: Config, ranks: Ranks, device: Device, store: Any = None) -> None:
    """Initialize torch.distributed and the tensor, pipeline and data-parallel groups.

    On GPUs the communicator of all ranks is created here, bound to the GPU of this rank, so that
    an NCCL failure is reported before the model is built and barriers use that GPU. Those of the
    subgroups are created at their first use, as in Megatron-LM.
    """
    use_one_gloo_thread()
    dist.init_process_group(
        device.backend,
        store=dist.PrefixStore("groups", store if store is not None else rendezvous(ranks)),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
        device_id=device.torch if device.is_cuda else None,
    )
    with without_communicator_splits():
        _initialize_model_parallel(config)
    init_num_microbatches_calculator(
        ranks.rank,
        None,
        config.training.global_batch_size,
        config.training.micro_batch_size,
        parallel_state.get_data_parallel_world_size(),
    )
    set_random_seed(config.training.seed)


def _initialize_model_parallel(config: Config) -> None:
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )


def set_random_seed(seed: int) -> None:
    """Seed all random generators, with Megatron-LM's offsets per pipeline and data-parallel rank.

    They determine dropout; initial weights have their own seeds (``model/initialization.py``).
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    # Dropout masks must differ between data-parallel replicas, and between parts of a sequence.
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    seed = seed + 100 * stage + 10 * replica
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def destroy() -> None:
    """Destroy all process groups, at the end of a run and between tests."""
    destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether this is rank 0, which prints messages; True without process groups."""
    return not dist.is_initialized() or dist.get_rank() == 0
