"""Process groups of one rank without its peers: collectives return at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@dataclass
class RequestedGroups:
    """Backends and devices that the code has requested."""

    backends: set[str] = field(default_factory=set)
    device_id: Any = None
    """``device_id`` of ``init_process_group``."""


def replace_process_groups(record: Callable[[str], None]) -> RequestedGroups:
    """Make all process groups fake for the rest of this process.

    Args:
        record: called with the name of each collective that the host waits for.
    """
    requested = RequestedGroups()
    distributed: Any = dist
    initialize, new_group = dist.init_process_group, dist.new_group

    def fake_initialize(backend: str, *args: Any, **kwargs: Any) -> None:
        requested.backends.add(backend)
        requested.device_id = kwargs.pop("device_id", None)
        initialize("fake", *args, **{**kwargs, "store": FakeStore()})

    def fake_new_group(
        ranks: Any = None,
        timeout: Any = None,
        backend: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if backend is not None:  # None means the default group's
            requested.backends.add(backend)
        kwargs.pop("device_id", None)
        return new_group(ranks, timeout, "fake", *args, **kwargs)

    distributed.init_process_group, distributed.new_group = fake_initialize, fake_new_group
    _replace_object_collectives(record)
    _replace_coalescing()
    return requested


def _replace_object_collectives(record: Callable[[str], None]) -> None:
    """Give this rank's object for that of every other; the real ones read tensors on the host."""
    distributed: Any = dist

    def all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
        record("all_gather_object")
        objects[:] = [own] * len(objects)

    def gather_object(own: Any, objects: list[Any] | None = None, *_: Any, **__: Any) -> None:
        record("gather_object")
        if objects is not None:
            objects[:] = [own] * len(objects)

    def broadcast_object_list(objects: list[Any], *_: Any, **__: Any) -> None:
        record("broadcast_object_list")

    distributed.all_gather_object = all_gather_object
    distributed.gather_object = gather_object
    distributed.broadcast_object_list = broadcast_object_list


class _Done:
    """Handle of a collective that is complete."""

    def wait(self, *_: Any) -> bool:
        return True


def _replace_coalescing() -> None:
    """Run the collectives of a coalescing block one by one: fake groups cannot batch them."""
    from megatron.core.distributed import param_and_grad_buffer

    @contextlib.contextmanager
    def one_by_one(*_: Any, **__: Any) -> Iterator[_Done]:
        yield _Done()

    param_and_grad_buffer._coalescing_manager = one_by_one
