"""Process groups: rendezvous, initialization, random seeds, synchronization of ranks, shutdown.

A training collective times out after ``distributed_timeout_minutes``. After work whose duration
differs much between ranks, such as writing to a slow disk, ranks synchronize through
:class:`RankSync`, which has no timeout: the watchdog (``training/watchdog.py``) detects a rank that
hangs, by its heartbeats, and an exited rank closes its connections.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import RunError
from megatron_llmjp.filesystem import no_heartbeat
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.parallel.ranks import Ranks

UNLIMITED = timedelta(days=30)
"""No timeout in practice; gloo requires one."""

_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set to "True" by torchrun when it runs the store's server itself."""


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
    return dist.new_group(backend="gloo", timeout=UNLIMITED)


def rendezvous(ranks: Ranks) -> Any:
    """Connect to the key-value store that all ranks share, before any process group exists.

    Ranks exchange values through it where one may take longer than a collective's timeout.
    """
    if ranks.world_size == 1:
        return dist.HashStore()
    if is_loopback(ranks.master_addr):
        return _rendezvous_on_loopback(ranks)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = ranks.master_addr, ranks.master_port
    found = dist.rendezvous("env://", rank=ranks.rank, world_size=ranks.world_size)
    return next(iter(found))[0]


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from its own machine only."""
    if address == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False


def _rendezvous_on_loopback(ranks: Ranks) -> Any:
    """Connect to a store that listens on the loopback interface only.

    The store has no authentication, and torch's server listens on all interfaces by default.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and is_loopback(a.address) for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    serves = ranks.is_first and os.environ.get(_AGENT_STORE) != "True"
    return dist.TCPStore(
        ranks.master_addr,
        int(ranks.master_port),
        ranks.world_size,
        is_master=serves,
        timeout=dist.default_pg_timeout,
        master_listen_fd=_listen(ranks) if serves else None,
    )


def _listen(ranks: Ranks) -> int:
    """Open the store's listening socket and return its file descriptor."""
    family = socket.AF_INET6 if ":" in ranks.master_addr else socket.AF_INET
    address = (ranks.master_addr, int(ranks.master_port))
    try:
        return socket.create_server(address, family=family, backlog=ranks.world_size).detach()
    except OSError as error:
        raise RunError(
            f"the rendezvous of the ranks cannot listen on {address[0]} port {address[1]}: "
            f"{error.strerror}. Start again, or set MASTER_PORT to another port"
        ) from None


def all_gather_from_store(store: Any, ranks: Ranks, key: str, value: Any) -> list[Any]:
    """Gather a value from every rank through the key-value store.

    There is no timeout: the watchdog ends a wait for a rank that hangs.

    Args:
        store: result of :func:`rendezvous`.
        ranks: rank and world size of this process.
        key: name of the value; every call needs a new one.
        value: this rank's value, serializable as JSON.

    Returns:
        The values by rank.
    """
    keys = [f"{key}/{rank}" for rank in range(ranks.world_size)]
    store.set(keys[ranks.rank], json.dumps(value))
    store.wait(keys, UNLIMITED)
    return [json.loads(store.get(key)) for key in keys]


def initialize(config: Config, ranks: Ranks, device: Device, store: Any = None) -> None:
    """Initialize torch.distributed and the tensor, pipeline and data-parallel groups."""
    dist.init_process_group(
        device.backend,
        store=dist.PrefixStore("groups", store if store is not None else rendezvous(ranks)),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
    )
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    init_num_microbatches_calculator(
        ranks.rank,
        None,
        config.training.global_batch_size,
        config.training.micro_batch_size,
        parallel_state.get_data_parallel_world_size(),
    )
    set_random_seed(config.training.seed)


def set_random_seed(seed: int) -> None:
    """Seed all random generators, with Megatron-LM's offsets per pipeline and data-parallel rank.

    They determine dropout; initial weights have their own seeds (``model/initialization.py``).
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    # Dropout masks must differ between data-parallel replicas.
    seed = seed + 100 * stage + 10 * parallel_state.get_data_parallel_rank()
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
