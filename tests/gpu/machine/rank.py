"""One rank of the machine: the replaced functions, and the modes that tensors run under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu.machine.attention import replace_attention
from tests.gpu.machine.collectives import RequestedGroups, replace_process_groups
from tests.gpu.machine.devices import replace_torch_cuda
from tests.gpu.machine.host_waits import HostWaits, read_values_through


class _ValuelessTensors(FakeTensorMode):
    """``FakeTensorMode`` that creates no tensor on the devices, which have no memory."""

    avoid_device_init = True  # type: ignore[assignment]


@dataclass(frozen=True)
class Machine:
    """The machine, as the code that runs on it sees it."""

    waits: HostWaits
    groups: RequestedGroups
    attention: set[str]
    """Attention kernels that were used: ``flash``, ``documents``, ``efficient``, ``math``."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Create all tensors without values within the block."""
        with _ValuelessTensors(allow_non_fake_inputs=True), self.waits:
            yield


def become_machine() -> Machine:
    """Make this process a rank of the machine; it cannot be undone."""
    torch._dynamo.config.disable = True  # type: ignore[attr-defined]  # functions run uncompiled
    waits = HostWaits()
    replace_torch_cuda(waits.record)
    read_values_through(waits)
    attention: set[str] = set()
    replace_attention(attention.add)
    return Machine(waits, replace_process_groups(waits.record), attention)
