"""Process groups: rendezvous, seeds, collective work of all ranks, shutdown.

Work that takes one rank much longer than the others, such as writing to a slow disk.

A collective of training gives up after ``distributed_timeout_minutes``. Before ranks meet in one
after such work, they wait here instead, as long as it takes: a rank that does nothing any more is
found by the watchdog (``training/watchdog.py``), to which the work gives heartbeats, and one that
is gone closes its connections.

Process groups, seeds, and the orderly end of all ranks.
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

LONGEST = timedelta(days=30)
"""No limit in practice; gloo wants one."""


@dataclass(frozen=True)
class LongWork:
    """How ranks do long work together: its heartbeats, and the group that they wait in."""

    beat: Callable[[], None] = no_heartbeat
    """Called after each piece of work, from any thread."""
    group: Any = None
    """Of all ranks, over gloo, without a limit (:func:`patient_group`); None for the default
    group, whose limit then holds."""

    def wait_for_all(self) -> None:
        """Return when every rank has come here; a collective."""
        dist.barrier(self.group)

    def first_rank_does(self, action: Callable[[], None]) -> None:
        """Have the first rank act; its failure is every rank's, so that none waits for another.

        Raises:
            Exception: whatever the action raised, on all ranks.
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


UNWATCHED = LongWork()


def patient_group() -> Any:
    """A new group of all ranks over gloo, in which they may wait for each other for days."""
    return dist.new_group(backend="gloo", timeout=LONGEST)


_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""torchrun's promise that it runs the store's server itself, where it is "True"."""


def meet(ranks: Ranks) -> Any:
    """Join the key-value store that all ranks share; process groups come later.

    What may take longer than a collective waits is agreed on through it.
    """
    if ranks.world_size == 1:
        return dist.HashStore()
    if is_loopback(ranks.master_addr):
        return _meet_on_this_machine(ranks)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = ranks.master_addr, ranks.master_port
    meeting = dist.rendezvous("env://", rank=ranks.rank, world_size=ranks.world_size)
    return next(iter(meeting))[0]


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from its own machine only."""
    if address == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False


def _meet_on_this_machine(ranks: Ranks) -> Any:
    """The same where all ranks are on this machine: nothing listens to the network.

    The store has no password, and torch lets its server listen on all interfaces.
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
    """A socket that takes connections from this machine, as a descriptor."""
    family = socket.AF_INET6 if ":" in ranks.master_addr else socket.AF_INET
    place = (ranks.master_addr, int(ranks.master_port))
    try:
        return socket.create_server(place, family=family, backlog=ranks.world_size).detach()
    except OSError as error:
        raise RunError(
            f"cannot listen on {place[0]} port {place[1]}, where the ranks meet: {error.strerror}. "
            "Start again, or set MASTER_PORT to another port"
        ) from None


def exchange(store: Any, ranks: Ranks, subject: str, mine: Any) -> list[Any]:
    """What every rank has to say about a subject, by rank; no two exchanges share a subject.

    It waits as long as the slowest rank takes: the watchdog ends a wait for one that hangs.

    Args:
        store: of :func:`meet`.
        ranks: this process's place.
        subject: what it is about.
        mine: this rank's part, as JSON.
    """
    keys = [f"{subject}/{rank}" for rank in range(ranks.world_size)]
    store.set(keys[ranks.rank], json.dumps(mine))
    store.wait(keys, LONGEST)
    return [json.loads(store.get(key)) for key in keys]


def start(config: Config, ranks: Ranks, device: Device, store: Any = None) -> None:
    """Join the other processes and build tensor, pipeline and data-parallel groups."""
    dist.init_process_group(
        device.backend,
        store=dist.PrefixStore("groups", store if store is not None else meet(ranks)),
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
    seed_everything(config.training.seed)


def seed_everything(seed: int) -> None:
    """Seed all generators: alike over data parallel ranks, apart over pipeline stages.

    The offsets are Megatron-LM's. They decide dropout; initial weights have seeds of their own
    (``model/initialization.py``).
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    # Dropout must differ between copies of the model, or all of them drop the same units.
    seed = seed + 100 * stage + 10 * parallel_state.get_data_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Leave all groups; for the end of a run and between tests."""
    destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether this process speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0
