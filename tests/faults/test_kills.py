"""kill -9 at random moments, most of them where it hurts, until a run reaches its end all the same.

``FAULT_KILLS`` sets the number of kills, ``FAULT_SEED`` what is drawn; both are printed.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_llmjp.checkpoint import manifest as manifests
from tests.faults.forks import Fault
from tests.faults.injected import UNFINISHED, die_at_call, die_writing
from tests.faults.stage import FOLD_ENDS, LAYOUTS, Stage, Start
from tests.support.proof import assert_whole

KILLS = int(os.environ.get("FAULT_KILLS", "24"))
SEED = int(os.environ.get("FAULT_SEED", "20"))
SHARES = {"alone": 0.35, "alone-async": 0.35, "dp2": 0.15, "tp2-async": 0.15}
AIMED_AT_A_WRITE, LEAST_IN_A_WRITE = 0.4, 0.3
"""Shares of all kills."""
LOOKS = {"alone": (130,), "alone-async": (130,), "dp2": (160, 4), "tp2-async": (130, 48)}
"""Of each rank at two checkpoints in the making (``injected.die_writing``)."""
MOST_OF_A_RUN = 12
"""Kills."""
GONE_SECONDS = 30.0
"""A rank that dies takes all others down within this time."""


@pytest.mark.fault("kill -9", "the others end at once; restarts reach the same losses and weights")
@pytest.mark.timeout(600 + 20 * KILLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_again_and_again(stage, layout, record_property):
    stage.reference(layout)
    wanted = max(1, round(KILLS * SHARES[layout]))
    moments = draw_moments(wanted, random.Random(f"{SEED} {layout}"))
    at_once = max(1, (os.cpu_count() or 1) // ranks_of(layout))
    with ThreadPoolExecutor(at_once) as pool:
        done = [
            pool.submit(kill_and_prove, stage, layout, moments[i::at_once], f"{SEED} {layout} {i}")
            for i in range(at_once)
        ]
        told = [kill for part in done for kill in part.result()]
    print(f"seed {SEED}, {layout}: {len(told)} kills: {'; '.join(told)}")
    for kill in sorted(set(told)):
        record_property(f"fault: kill -9 of {kill}", told.count(kill))
    in_a_write = sum(kill.endswith(WRITING) for kill in told)
    assert in_a_write >= LEAST_IN_A_WRITE * wanted, f"{in_a_write} of {wanted} kills in a write"


def kill_and_prove(stage: Stage, layout: str, moments: list[str], seed: str) -> list[str]:
    """Kill runs at all these moments, each run some times, and resume it to its end."""
    draw, told = random.Random(seed), []
    while len(told) < len(moments):
        save = stage.folder(f"killed-{layout}")
        for moment in moments[len(told) :][:MOST_OF_A_RUN]:
            kill = kill_once(stage, layout, save, draw, moment)
            if kill is None:
                break
            told.append(kill)
        stage.resume_and_prove(layout, save)
    return told


def draw_moments(number: int, draw: random.Random) -> list[str]:
    """When to kill, in random order; a fixed share aims at the writing of a checkpoint."""
    writing = math.ceil(AIMED_AT_A_WRITE * number)
    others = draw.choices([*MOMENTS, AT_A_CALL], [2, 3, 3, 3, 4], k=number - writing)
    moments = [WRITING] * writing + others
    draw.shuffle(moments)
    return moments


def kill_once(
    stage: Stage, layout: str, save: Path, draw: random.Random, moment: str
) -> str | None:
    """Start the run, and kill it: what was killed, and when; None if the run ends before.

    A kill counts as one in a write if it left a checkpoint's unfinished folder that was not there
    before, whatever moment was aimed at.
    """
    victim = draw.choice(list(VICTIMS) if ranks_of(layout) > 1 else ["all"])
    cache = save.with_name(f"{save.name}-cache")
    fault = injected(moment, victim, layout, draw)
    before = unfinished(save)
    with stage.started(layout, save, "--data-cache-path", cache, fault=fault) as start:
        if fault is None:
            if not MOMENTS[moment](start, save, draw):
                return None
            ranks = start.ranks()
            start.kill(victim, draw)
        else:
            start.until(lambda: len(start.ranks()) == ranks_of(layout))
            ranks = start.ranks()
            if start.wait() == 0:
                return None
        _, alive = psutil.wait_procs(ranks, timeout=GONE_SECONDS)
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
        assert start.wait() != 0
        if "Traceback" in start.err:
            assert "closed by peer" in start.err or "Connection" in start.err, start.err
    if save.is_dir():
        assert_whole(save)
    whom = "the first rank" if moment == AT_A_CALL else VICTIMS[victim]
    if unfinished(save) - before:
        return f"{whom} {WRITING}"
    assert moment != WRITING, "killed as it wrote, but nothing is left of that"
    return f"{whom} {moment}"


def injected(moment: str, victim: str, layout: str, draw: random.Random) -> Fault | None:
    """What strikes inside a rank, for moments that cannot be met from outside."""
    if moment == AT_A_CALL:
        return die_at_call.__name__, draw.randint(1, 160)
    if moment == WRITING:
        which = draw.randrange(ranks_of(layout))
        return die_writing.__name__, draw.randint(1, LOOKS[layout][which]), victim, which
    return None


def ranks_of(layout: str) -> int:
    return 2 if "--nproc-per-node" in LAYOUTS[layout] else 1


def unfinished(save: Path) -> set[tuple[str, int, int]]:
    """Unfinished folders of checkpoints, told apart from those of another run."""
    found = set()
    for path in save.glob(".iter_*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            if UNFINISHED.fullmatch(path.name):
                found.add((path.name, state.st_ino, state.st_mtime_ns))
    return found


def at_any_time(start: Start, save: Path, draw: random.Random) -> bool:
    time.sleep(draw.uniform(0, 2.5))
    return not start.is_over


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
    "as a checkpoint gets its name": when_named,
    "as the tracker moves": when_tracked,
    "at a fold's change": at_a_fold_change,
}
WRITING = "while a checkpoint is written"
AT_A_CALL = "before a system call on the save folder"
VICTIMS = {"one": "one rank", "all": "everything", "launcher": "the launcher"}
