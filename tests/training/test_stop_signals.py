"""Agreement of ranks on stop requests, including while they wait for a rank."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch.distributed as dist

from megatron_llmjp.checkpoint.save_clock import SaveClock
from megatron_llmjp.config.schema import CheckpointConfig
from megatron_llmjp.parallel.process_groups import new_group_without_timeout
from megatron_llmjp.parallel.signals import StopRequests
from megatron_llmjp.training.stop_signals import StopCoordinator, StopReason
from tests.support.processes import run_ranks


def wait_together() -> list[Any]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    requests = StopRequests()
    coordinator = StopCoordinator(None, requests, rank == 0, new_group_without_timeout())
    results: list[Any] = [coordinator.agreed().name]
    ready_at = time.monotonic() + (1.0 if rank == 1 else 0.0)
    results.append(coordinator.wait_until(lambda: time.monotonic() > ready_at))
    results.append(time.monotonic() > ready_at)
    results.append(coordinator.agreed().name)
    if rank == 1:
        requests.signal = signal.SIGTERM
    results.append(coordinator.wait_until(lambda: rank == 1))  # rank 0 is never ready
    results.append(coordinator.agreed().name)
    coordinator.close()
    return results


def save_together() -> list[str]:
    """Return the save that is due in each iteration; only rank 0's clock counts."""
    dist.init_process_group("gloo")
    rank, time = dist.get_rank(), [0.0]
    clock = SaveClock(CheckpointConfig(save="x"), lambda: time[0] * 60)
    group = new_group_without_timeout()
    coordinator = StopCoordinator(None, StopRequests(), rank == 0, group, clock)
    found = []
    for iteration in range(1, 12):
        time[0] += 10 if rank == 0 else 100
        found.append(coordinator.timed_save().name)
        # At iteration 4 another rule saves: the votes that were cast before do not count.
        if found[-1] != "NONE" or iteration == 4:
            coordinator.restart_save_clock()
        for _ in range(3 if iteration == 2 else 1):  # a validation looks for stop requests too
            coordinator.agreed()
    coordinator.close()
    return found


def test_ranks_save_together():
    """With steps of 10 minutes the votes of iterations 3 and 7 are the first for a save."""
    expected = ["NONE"] * 11
    expected[9 - 1] = "NON_PERSISTENT"
    assert run_ranks(save_together, 2) == [expected, expected]


def test_reasons_in_order():
    """Of several the greatest takes effect; only a stop file prevents a requeue (exit code 3)."""
    found = [(r.name, int(r), r.description, r.exit_code) for r in StopReason if r]
    assert found == [
        ("FILE", 1, "file 'stop' found in the save folder", 0),
        ("INTERVAL", 2, "--exit-interval reached", 3),
        ("DURATION", 3, "--exit-duration-in-mins reached", 3),
        ("SIGNAL", 4, "signal received", 3),
    ]
    assert (StopReason.NONE, StopReason.NONE.description) == (0, "")
    assert [r.name for r in StopReason if r.is_interruption] == ["DURATION", "SIGNAL"]


def test_ranks_wait_or_stop_together():
    expected = ["NONE", True, True, "NONE", False, StopReason.SIGNAL.name]
    assert run_ranks(wait_together, 2) == [expected, expected]
