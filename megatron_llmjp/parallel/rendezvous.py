"""Rendezvous of the ranks: the key-value store that they share before any process group exists.

Imports torch, but not megatron-core.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from megatron_llmjp.errors import RunError
from megatron_llmjp.parallel.ranks import Ranks

UNLIMITED = timedelta(days=30)
"""No timeout in practice; gloo requires one."""

_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set to "True" by torchrun when it runs the store's server itself."""


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


def all_gather_from_store(
    store: Any, ranks: Ranks, key: str, value: Any, timeout: timedelta = UNLIMITED
) -> list[Any]:
    """Gather a value from every rank through the key-value store.

    By default there is no timeout: the watchdog ends a wait for a rank that hangs.

    Args:
        store: result of :func:`rendezvous`.
        ranks: rank and world size of this process.
        key: name of the value; every call needs a new one.
        value: this rank's value, serializable as JSON.
        timeout: longest wait for the other ranks.

    Returns:
        The values by rank.
    """
    keys = [f"{key}/{rank}" for rank in range(ranks.world_size)]
    store.set(keys[ranks.rank], json.dumps(value))
    store.wait(keys, timeout)
    values = [json.loads(store.get(key)) for key in keys]
    # The first rank may serve the store and exit because of the values: it returns last.
    if store.add(f"{key}/read", 1) == ranks.world_size:
        store.set(f"{key}/done", "")
    if ranks.is_first:
        store.wait([f"{key}/done"], timeout)
    return values
