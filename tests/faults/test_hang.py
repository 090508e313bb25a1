"""Hang detection: hung ranks are reported with the stacks of all ranks, slow ones are not."""

from __future__ import annotations

import json
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.errors import EXIT_FAILURE
from megatron_llmjp.parallel.process_groups import RankSync, new_group_without_timeout
from megatron_llmjp.parallel.rendezvous import UNLIMITED
from megatron_llmjp.training import watchdog
from megatron_llmjp.training.hang_report import RankState, describe_ranks
from megatron_llmjp.training.wait_sites import Wait
from megatron_llmjp.training.watchdog import HangTimer, Watchdog
from tests.faults.stage import LAST
from tests.support.processes import run_ranks
from tests.support.timeouts import PROCESS_TIMEOUT


def hang(folder: str, culprit: int) -> None:
    """Reduce on three ranks, one of which never joins."""
    watchdog.GRACE_SECONDS = 2.0
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    watch = Watchdog(store, rank, dist.get_world_size(), 0.02, Path(folder))
    watch.start()
    for iteration in range(3):
        watch.begin(iteration, "step")
        dist.all_reduce(torch.ones(1))
        if iteration == 2 and rank == culprit:
            sleep_forever()
    watch.begin(3, "step")
    dist.all_reduce(torch.ones(1))


def sleep_forever() -> None:
    time.sleep(10 * PROCESS_TIMEOUT)


@pytest.mark.fault(
    "a rank that does not reach a collective", "reported, with the stacks of all ranks; exit code 1"
)
def test_a_missing_rank_is_reported(tmp_path):
    with pytest.raises(AssertionError, match="failed"):
        run_ranks(hang, 3, str(tmp_path), 1)
    report, *stacks, suspects = sorted(tmp_path.iterdir())
    assert [path.name for path in stacks] == [f"stacks-rank{rank:05d}.txt" for rank in range(3)]
    assert ["sleep_forever" in path.read_text() for path in stacks] == [False, True, False]
    assert [one["rank"] for one in json.loads(suspects.read_text())["suspects"]] == [1]
    first, second = report.read_text().splitlines()[1:3]
    assert first.startswith("rank 1 on") and first.endswith("check first")
    assert second.startswith("ranks 0, 2 on") and "waits for other ranks" in second


def state(rank: int, iteration: int = 7, waits: Wait = "other ranks", line: str = "a") -> RankState:
    return RankState(rank, f"node{rank // 2}", iteration, "step", iteration, line, waits)


def test_description_of_ranks():
    everyone_waits = describe_ranks([state(r, line=f"{r // 3}") for r in (0, 1, 2, 3)], 4)
    assert len(everyone_waits) == 3 and everyone_waits[0].startswith("ranks 0-2 on node0, node1")
    assert everyone_waits[2].startswith("all ranks wait") and "check first" not in everyone_waits[0]
    silent = describe_ranks([state(r) for r in (0, 1, 3, 4, 7)], 8)
    assert silent[0].startswith("ranks 2, 5-6: no response")
    busy = describe_ranks([state(0), state(1), state(2, waits="", line="read")], 3)
    assert busy[0].startswith("rank 2 on node1") and busy[0].endswith("check first")
    behind = describe_ranks([state(0, 8, waits=""), state(1, 7), state(2, 8)], 3)
    assert behind[0].startswith("rank 1 on node0: iteration 7") and "check first" in behind[0]
    on_gpus = describe_ranks([state(0, waits="its GPU"), state(1), state(2, waits="")], 3)
    assert on_gpus[0].startswith("rank 2 on node1") and on_gpus[0].endswith("check first")
    assert "waits for its GPU, which may" in on_gpus[1] and "waits for other" in on_gpus[2]


def test_hang_timer():
    """It expires at a second check, and excludes time in which the process was stopped."""
    timer = HangTimer(100.0)
    checks = [timer.expired(5.0 * i, progressed=False) for i in range(24)]
    assert checks.index(True) == 22  # exceeded at 105 s, confirmed by the next check
    assert not timer.expired(120.0, progressed=True)
    assert not timer.expired(10_000.0, progressed=False)  # the machine was suspended
    recovering = HangTimer(100.0)
    for i in range(22):
        assert not recovering.expired(5.0 * i, progressed=False)
    assert not recovering.expired(110.0, progressed=True)
    assert not recovering.expired(115.0, progressed=False)


def slow_rank() -> str:
    """Work on one rank for longer than the limit, while the other waits."""
    watchdog.GRACE_SECONDS = 1.0
    dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()
    watch = Watchdog(store, dist.get_rank(), dist.get_world_size(), 0.1, None)
    sync = RankSync(watch.beat, new_group_without_timeout())
    watch.begin(1, "a save")
    watch.start()
    if dist.get_rank() == 1:
        for _ in range(100):
            time.sleep(0.1)
            sync.beat()
    sync.barrier()
    watch.close()
    options = sync.group._get_backend(torch.device("cpu")).options
    assert options._timeout == UNLIMITED  # longer than the timeout of training
    return "done"


@pytest.mark.long
def test_a_rank_that_waits_for_a_slow_one_is_healthy():
    assert run_ranks(slow_rank, 2) == ["done", "done"]


SLOW = "the run continues; the same losses and weights"
LIMIT = 4.0
"""Hang limit in seconds; slow operations take twice as long."""


@pytest.mark.long
@pytest.mark.fault("a validation that takes longer than the hang limit", "the run continues")
def test_a_slow_validation(stage):
    save = stage.folder("slow-validation")
    fault = ("slow_validation", 5, LIMIT, LIMIT / 8, 16)
    code, _, errors = stage.run("alone", save, "--eval-iters", 16, fault=fault)
    assert code == 0, errors
    assert manifests.complete_iterations(save)[-1] == LAST


@pytest.mark.long
@pytest.mark.fault("a write that takes longer than the hang limit", SLOW)
@pytest.mark.parametrize(("layout", "which"), [("alone", 0), ("alone-async", 0), ("dp2", 1)])
def test_a_slow_disk(stage, layout, which):
    """At the last save, which is synchronous; the other rank waits for this one."""
    save = stage.folder("slow-disk")
    fault = ("slow_write", LAST, LIMIT, LIMIT / 8, 16, which)
    code, _, errors = stage.run(layout, save, fault=fault)
    assert code == 0, errors
    stage.prove(layout, save)


@pytest.mark.long
@pytest.mark.fault("a process that is suspended for longer than the hang limit", SLOW)
def test_a_process_that_is_suspended(stage):
    save = stage.folder("suspended")
    with stage.started("alone", save, fault=("suspended_at", 5, LIMIT)) as start:
        process = psutil.Process(start.pid)
        start.until(lambda: process.status() == psutil.STATUS_STOPPED)
        time.sleep(2 * LIMIT)
        process.send_signal(signal.SIGCONT)
        assert start.wait() == 0, start.stderr
    stage.prove("alone", save)


REPORTED = "reported, with stacks; exit code 1; the same losses and weights after a restart"


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "fault", "what"),
    [
        pytest.param(
            "dp2",
            ("slow_write", 6, 3.0, 0, 1, 1),
            r"rank 1 on .*: iteration 6, a save; does not wait for another rank; .* <- check first",
            marks=pytest.mark.fault("a write that hangs", REPORTED),
        ),
        pytest.param(
            "cp2",
            ("endless_loop", 5, 3.0, 1),
            r"rank 1 on .*: iteration 5, a step; does not wait for another rank; .* <- check first",
            marks=pytest.mark.fault("a rank in an endless loop", REPORTED),
        ),
    ],
)
def test_a_rank_that_hangs(stage, layout, fault, what):
    save = stage.folder("hung")
    code, _, errors = stage.run(layout, save, fault=fault)
    assert code == EXIT_FAILURE
    assert "error: no progress for 0.05 minutes at iteration" in errors
    assert re.search(what, errors), errors
    assert (save / "hang" / "stacks-rank00001.txt").read_text()
    stage.resume_and_prove(layout, save)
