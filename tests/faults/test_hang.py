"""A rank that hangs is named, with the stacks of all ranks, and the run ends."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_llmjp.training import watchdog
from megatron_llmjp.training.watchdog import Place, Watchdog, blame
from tests.support.processes import run_ranks


def hang(folder: str, culprit: int) -> None:
    """Three ranks reduce; one of them never comes."""
    watchdog.GRACE_SECONDS = 2.0
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    watch = Watchdog(store, rank, dist.get_world_size(), 0.02, Path(folder))
    watch.start()
    for iteration in range(3):
        watch.beat(iteration, "step")
        dist.all_reduce(torch.ones(1))
        if iteration == 2 and rank == culprit:
            lost_in_thought()
    watch.beat(3, "step")
    dist.all_reduce(torch.ones(1))


def lost_in_thought() -> None:
    time.sleep(100)


@pytest.mark.fault("a rank that does not come", "named, with the stacks of all ranks; exit code 1")
def test_the_rank_that_does_not_come_is_named(tmp_path):
    with pytest.raises(AssertionError, match="failed"):
        run_ranks(hang, 3, str(tmp_path), 1, timeout=60)
    report, *stacks = sorted(tmp_path.iterdir())
    assert [path.name for path in stacks] == [f"stacks-rank{rank:05d}.txt" for rank in range(3)]
    assert ["lost_in_thought" in path.read_text() for path in stacks] == [False, True, False]
    first, second = report.read_text().splitlines()[1:3]
    assert first.startswith("rank 1 on") and first.endswith("look here first")
    assert second.startswith("ranks 0, 2 on") and "waits for other ranks" in second


def place(rank: int, iteration: int = 7, waits: bool = True, line: str = "a") -> Place:
    return Place(rank, f"node{rank // 2}", iteration, "step", line, waits)


def test_blame():
    everyone_waits = blame([place(r) for r in (0, 1, 2, 3)], 4)
    assert len(everyone_waits) == 1 and everyone_waits[0].startswith("ranks 0-3 on node0, node1")
    silent = blame([place(r) for r in (0, 1, 3, 4, 7)], 8)
    assert silent[0].startswith("ranks 2, 5-6: no answer")
    busy = blame([place(0), place(1), place(2, waits=False, line="read")], 3)
    assert busy[0].startswith("rank 2 on node1") and busy[0].endswith("look here first")
    behind = blame([place(0, 8, waits=False), place(1, 7), place(2, 8)], 3)
    assert behind[0].startswith("rank 1 on node0: iteration 7")
