"""Creation of process groups without splitting the communicator of all ranks.

What: ``bound_device_id`` of the default group is unset while further groups are created.

Why: after ``init_process_group(device_id=...)``, ``new_group`` creates the NCCL communicator of
every group at once by ``ncclCommSplit``, also of groups that never communicate, and each takes
memory of the GPU outside PyTorch's allocator (16 GiB in total on eight GPUs, pull request 939 of
AMD-AGI/Primus). Sends and receives of the pipeline then share one communicator, in which they are
serialized, instead of one for each pair of stages (pytorch/pytorch pull request 154132; a TP4 x PP2
run of NVIDIA-NeMo/RL became slower, its pull request 3073). gloo groups are bound to the GPU too:
their barriers and object broadcasts then copy to it and back.

Remove when ``new_group`` no longer looks at the default group's device. It does in torch 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


@contextlib.contextmanager
def without_communicator_splits() -> Iterator[None]:
    """Let groups that are created in the block create their communicators at their first use."""
    default: Any = dist.group.WORLD
    device, default.bound_device_id = default.bound_device_id, None
    try:
        yield
    finally:
        default.bound_device_id = device
