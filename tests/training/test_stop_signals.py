"""Ranks agree on when to stop, also while they wait for one of them."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch.distributed as dist

from megatron_llmjp.parallel.process_groups import new_group_without_timeout
from megatron_llmjp.parallel.signals import StopRequests
from megatron_llmjp.training.stop_signals import StopCoordinator, StopReason
from tests.support.processes import run_ranks


def wait_together() -> list[Any]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    requests = StopRequests()
    guard = StopCoordinator(None, requests, rank == 0, new_group_without_timeout())
    told: list[Any] = [guard.agreed().name]
    there = time.monotonic() + (1.0 if rank == 1 else 0.0)
    told.append(guard.wait_until(lambda: time.monotonic() > there))
    told.append(time.monotonic() > there)
    told.append(guard.agreed().name)
    if rank == 1:
        requests.signal = signal.SIGTERM
    told.append(guard.wait_until(lambda: rank == 1))  # the other never is
    told.append(guard.agreed().name)
    guard.close()
    return told


def test_ranks_wait_for_each_other_or_stop_together():
    expected = ["NONE", True, True, "NONE", False, StopReason.SIGNAL.name]
    assert run_ranks(wait_together, 2) == [expected, expected]
