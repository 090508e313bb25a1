"""kill -9 at random moments, most of them where it hurts, until a run reaches its end all the same.

``FAULT_KILLS`` sets the number of kills, ``FAULT_SEED`` what is drawn; both are printed.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_llmjp.checkpoint import manifest as manifests
from tests.faults.injected import die_at_call
from tests.faults.stage import FOLD_ENDS, LAYOUTS, Stage, Start
from tests.support.proof import assert_whole

KILLS = int(os.environ.get("FAULT_KILLS", "24"))
SEED = int(os.environ.get("FAULT_SEED", "20"))
SHARES = {"alone": 0.35, "alone-async": 0.35, "dp2": 0.15, "tp2-async": 0.15}
GONE_SECONDS = 30.0
"""A rank that dies takes all others down within this time."""


@pytest.mark.fault("kill -9", "the others end at once; restarts reach the same losses and weights")
@pytest.mark.timeout(600 + 20 * KILLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_again_and_again(stage, layout, record_property):
    draw = random.Random(f"{SEED} {layout}")
    stage.reference(layout)
    wanted, done, told = max(1, round(KILLS * SHARES[layout])), 0, []
    while done < wanted:
        save = stage.folder(f"killed-{layout}")
        for _ in range(12):
            if done == wanted or not kill_once(stage, layout, save, draw, told):
                break
            done += 1
        stage.resume_and_prove(layout, save)
    print(f"seed {SEED}, {layout}: {done} kills: {'; '.join(told)}")
    for kill in sorted(set(told)):
        record_property(f"fault: kill -9 of {kill}", told.count(kill))


def kill_once(stage: Stage, layout: str, save: Path, draw: random.Random, told: list[str]) -> bool:
    """Start the run, and kill it; False if it ends before."""
    moment = draw.choices([*MOMENTS, AT_A_CALL], [2, 3, 3, 2, 3, 4])[0]
    victim = draw.choice(list(VICTIMS) if "--nproc-per-node" in LAYOUTS[layout] else ["all"])
    cache = save.with_name(f"{save.name}-cache")
    fault = (die_at_call.__name__, draw.randint(1, 160)) if moment == AT_A_CALL else None
    with stage.started(layout, save, "--data-cache-path", cache, fault=fault) as start:
        if fault is None:
            if not MOMENTS[moment](start, save, draw):
                return False
            ranks = start.ranks()
            start.kill(victim, draw)
        else:
            ranks = []
            start.until(lambda: start.is_over)
            if start.wait() == 0:
                return False
        _, alive = psutil.wait_procs(ranks, timeout=GONE_SECONDS)
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
        assert start.wait() != 0
        told.append(f"{VICTIMS[victim]} {moment}" if fault is None else f"the first rank {moment}")
        if "Traceback" in start.err:
            assert "closed by peer" in start.err or "Connection" in start.err, start.err
    if save.is_dir():
        assert_whole(save)
    return True


def at_any_time(start: Start, save: Path, draw: random.Random) -> bool:
    time.sleep(draw.uniform(0, 2.5))
    return not start.is_over


def while_writing(start: Start, save: Path, draw: random.Random) -> bool:
    """A folder with a temporary name has come."""

    def folders() -> int:  # what a killed run left has another number
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_ino for path in save.glob(".iter_*.tmp"))
        return 0

    return after(start, draw, 0.15, folders)


def when_named(start: Start, save: Path, draw: random.Random) -> bool:
    """A checkpoint has got its name; the tracker may not know it."""
    return after(start, draw, 0.002, lambda: len(list(save.glob("iter_*"))))


def when_tracked(start: Start, save: Path, draw: random.Random) -> bool:
    """The tracker has changed."""
    return after(start, draw, 0.002, lambda: changed_at(save / manifests.TRACKER))


def at_a_fold_change(start: Start, save: Path, draw: random.Random) -> bool:
    """The last iteration of a fold is in the log."""
    words = [f'"iteration": {end}, ' for end in FOLD_ENDS[:-1]]

    def ends() -> int:
        path = save / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return sum(text.count(word) for word in words)

    return after(start, draw, 0.15, ends)


def after(start: Start, draw: random.Random, longest: float, state: Callable[[], int]) -> bool:
    """One of the next changes of a state, and a little later; False if the run ends before."""
    for _ in range(draw.randint(1, 3)):
        now = state()
        if not start.until(lambda now=now: state() not in (now, 0)):
            return False
    time.sleep(draw.uniform(0, longest))
    return not start.is_over


def changed_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


MOMENTS = {
    "at any time": at_any_time,
    "while a checkpoint is written": while_writing,
    "as a checkpoint gets its name": when_named,
    "as the tracker moves": when_tracked,
    "at a fold's change": at_a_fold_change,
}
AT_A_CALL = "before a system call on the save folder"
VICTIMS = {"one": "one rank", "all": "everything", "launcher": "the launcher"}
