"""kill -9 at random and at critical moments, with restarts until a run reaches its end.

``FAULT_KILLS`` sets the number of kills, ``FAULT_SEED`` the random seed; both are printed.
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
from tests.faults.injected_interruptions import UNFINISHED, kill_at_call, kill_while_writing
from tests.faults.stage import FOLD_ENDS, LAYOUTS, Stage, Start
from tests.faults.start import Fault
from tests.support.proof import assert_checkpoints_complete
from tests.support.timeouts import PROCESS_TIMEOUT, TIMEOUT

pytestmark = pytest.mark.long

KILLS = int(os.environ.get("FAULT_KILLS", "24"))
SEED = int(os.environ.get("FAULT_SEED", "20"))
SHARES = {"alone": 0.35, "alone-async": 0.35, "dp2": 0.1, "tp2-async": 0.1, "cp2": 0.1}
TARGET_IN_WRITE, MIN_IN_WRITE = 0.4, 0.3
"""Fractions of all kills."""
WRITE_OPERATIONS = {
    "alone": (130,),
    "alone-async": (130,),
    "dp2": (160, 4),
    "tp2-async": (130, 48),
    "cp2": (160, 4),
}
"""Of each rank at two checkpoints in the making (``injected.die_writing``)."""
MAX_KILLS_PER_RUN = 12


@pytest.mark.fault("kill -9", "the other processes end; restarts reach the same losses and weights")
@pytest.mark.timeout((2 + KILLS / 15) * TIMEOUT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeated_kills(stage, layout, record_property):
    stage.reference(layout)
    wanted = max(1, round(KILLS * SHARES[layout]))
    moments = draw_moments(wanted, random.Random(f"{SEED} {layout}"))
    at_once = max(1, (os.cpu_count() or 1) // ranks_of(layout))
    with ThreadPoolExecutor(at_once) as pool:
        done = [
            pool.submit(kill_and_prove, stage, layout, moments[i::at_once], f"{SEED} {layout} {i}")
            for i in range(at_once)
        ]
        kills = [kill for part in done for kill in part.result()]
    print(f"seed {SEED}, {layout}: {len(kills)} kills: {'; '.join(kills)}")
    for kill in sorted(set(kills)):
        record_property(f"fault: kill -9 of {kill}", kills.count(kill))
    in_a_write = sum(kill.endswith(WRITING) for kill in kills)
    assert in_a_write >= MIN_IN_WRITE * wanted, f"{in_a_write} of {wanted} kills in a write"


def kill_and_prove(stage: Stage, layout: str, moments: list[str], seed: str) -> list[str]:
    """Kill runs at all moments, several per run, and resume each run to its end."""
    draw, kills = random.Random(seed), []
    while len(kills) < len(moments):
        save = stage.folder(f"killed-{layout}")
        for moment in moments[len(kills) :][:MAX_KILLS_PER_RUN]:
            kill = kill_once(stage, layout, save, draw, moment)
            if kill is None:
                break
            kills.append(kill)
        stage.resume_and_prove(layout, save)
    return kills


def draw_moments(number: int, draw: random.Random) -> list[str]:
    """Draw the moments of kills; a fixed fraction is while a checkpoint is written."""
    writing = math.ceil(TARGET_IN_WRITE * number)
    others = draw.choices([*MOMENTS, AT_A_CALL], [2, 3, 3, 3, 4], k=number - writing)
    moments = [WRITING] * writing + others
    draw.shuffle(moments)
    return moments


KILLED_PEER = ("closed by peer", "Connection", "resource_sharer.py")
"""Errors of a rank, or of its thread that serves data workers, whose peer was killed first."""


def kill_once(
    stage: Stage, layout: str, save: Path, draw: random.Random, moment: str
) -> str | None:
    """Start and kill the run; return the victim and moment, or None if the run ended before.

    A kill counts as one while writing if it left a new unfinished folder of a checkpoint, whatever
    its intended moment.
    """
    victim = draw.choice(list(VICTIMS) if ranks_of(layout) > 1 else ["all"])
    cache = save.with_name(f"{save.name}-cache")
    fault = injected_fault(moment, victim, layout, draw)
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
        _, alive = psutil.wait_procs(ranks, timeout=PROCESS_TIMEOUT)
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
        assert start.wait() != 0
        if "Traceback" in start.stderr:
            assert any(text in start.stderr for text in KILLED_PEER), start.stderr
    if save.is_dir():
        assert_checkpoints_complete(save)
    killed = "the first rank" if moment == AT_A_CALL else VICTIMS[victim]
    if unfinished(save) - before:
        return f"{killed} {WRITING}"
    assert moment != WRITING, "killed while writing, but there is no unfinished folder"
    return f"{killed} {moment}"


def injected_fault(moment: str, victim: str, layout: str, draw: random.Random) -> Fault | None:
    """Return the fault to inject into a rank, for moments that cannot be reached from outside."""
    if moment == AT_A_CALL:
        return kill_at_call.__name__, draw.randint(1, 160)
    if moment == WRITING:
        which = draw.randrange(ranks_of(layout))
        return (
            kill_while_writing.__name__,
            draw.randint(1, WRITE_OPERATIONS[layout][which]),
            victim,
            which,
        )
    return None


def ranks_of(layout: str) -> int:
    return 2 if "--nproc-per-node" in LAYOUTS[layout] else 1


def unfinished(save: Path) -> set[tuple[str, int, int]]:
    """Unfinished folders of checkpoints, kills apart from those of another run."""
    found = set()
    for path in save.glob(".iter_*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            if UNFINISHED.fullmatch(path.name):
                found.add((path.name, state.st_ino, state.st_mtime_ns))
    return found


def at_any_time(start: Start, save: Path, draw: random.Random) -> bool:
    time.sleep(draw.uniform(0, 2.5))
    return start.poll() is None


def after_rename(start: Start, save: Path, draw: random.Random) -> bool:
    """After a checkpoint is renamed; the tracker may not be updated yet."""
    return after(start, draw, 0.002, lambda: len(list(save.glob("iter_*"))))


def after_tracker_change(start: Start, save: Path, draw: random.Random) -> bool:
    """After the tracker changes."""
    return after(start, draw, 0.002, lambda: changed_at(save / manifests.TRACKER))


def at_fold_boundary(start: Start, save: Path, draw: random.Random) -> bool:
    """After the last iteration of a fold is logged."""
    words = [f'"iteration": {end}, ' for end in FOLD_ENDS[:-1]]

    def ends() -> int:
        path = save / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return sum(text.count(word) for word in words)

    return after(start, draw, 0.15, ends)


def after(start: Start, draw: random.Random, longest: float, state: Callable[[], int]) -> bool:
    """Wait for one of the next changes of a state; return false if the run ends before."""
    for _ in range(draw.randint(1, 3)):
        now = state()
        if not start.until(lambda now=now: state() not in (now, 0)):
            return False
    time.sleep(draw.uniform(0, longest))
    return start.poll() is None


def changed_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


MOMENTS = {
    "at any time": at_any_time,
    "right after a checkpoint is renamed": after_rename,
    "right after the tracker changes": after_tracker_change,
    "at a fold boundary": at_fold_boundary,
}
WRITING = "while a checkpoint is written"
AT_A_CALL = "before a system call on the save folder"
VICTIMS = {"one": "one rank", "all": "all processes", "launcher": "the launcher"}
