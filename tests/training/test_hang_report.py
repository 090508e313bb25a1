"""Report on the ranks of a hung run, and the heartbeats that all ranks share."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_llmjp.training import hang_report, watchdog
from megatron_llmjp.training.hang_report import (
    HeartbeatExchange,
    Phase,
    RankState,
    describe_ranks,
    describe_silent_first_rank,
    find_suspects,
    rank_state,
)
from megatron_llmjp.training.wait_sites import Frame, Wait, find_wait, stack_frames
from tests.support.timeouts import wait_until


def state(
    rank: int, iteration: int = 7, waits_for: Wait = "other ranks", line: str = "a.py:1"
) -> RankState:
    host = f"node{rank // 2}"
    return RankState(rank, host, iteration, "a step", iteration, line, waits_for)


def test_lines_of_groups():
    """Silent ranks, then those at an earlier iteration, then those that wait for nobody."""
    states = [state(r) for r in (0, 1, 3)] + [state(4, 6), state(5, waits_for="", line="b.py:2")]
    waiting = "iteration 7, a step; waits for other ranks; a.py:1"
    assert describe_ranks([*states, state(9)], 10) == [
        "ranks 2, 6-8: no response (process stopped or exited, or machine down)",
        "rank 4 on node2: iteration 6, a step; waits for other ranks; a.py:1",
        "rank 5 on node2: iteration 7, a step; does not wait for another rank; b.py:2",
        f"ranks 0-1, 3, 9 on node0, node1, node4: {waiting}",
    ]
    states = [state(0), state(2, waits_for=""), state(1)]
    assert describe_ranks(states, 3) == [
        "rank 2 on node1: iteration 7, a step; does not wait for another rank; a.py:1"
        "   <- check first",
        f"ranks 0-1 on node0: {waiting}",
    ]
    assert describe_ranks([state(0), state(1)], 2) == [
        f"ranks 0-1 on node0: {waiting}",
        "all ranks wait: a GPU or a link hangs, or ranks disagree on the next collective; compare "
        "the stacks and, on GPUs, collectives-rank*.json",
    ]
    # At most four hosts.
    lines = describe_ranks([state(2 * n) for n in range(5)], 10)
    assert lines[1] == f"ranks 0, 2, 4, 6, 8 on node0, node1, node2, node3: {waiting}"
    assert describe_silent_first_rank(state(3)) == [
        "rank 0: no response (process stopped or exited, or machine down); it serves the store, "
        "without which the states of the other ranks are unknown   <- check first",
        f"rank 3 on node1: {waiting}",
    ]


def test_hosts_of_silent_ranks():
    """Ranks that do not respond are named with their hosts, which are known from the start."""
    hosts = [f"node{rank // 2}" for rank in range(6)]
    states = [state(rank) for rank in (0, 1, 4)]
    silent = "no response (process stopped or exited, or machine down)"
    assert describe_ranks(states, 6, hosts)[0] == f"ranks 2-3, 5 on node1, node2: {silent}"
    assert describe_silent_first_rank(state(3), hosts)[0].startswith(f"rank 0 on node0: {silent}")
    assert find_suspects(states, 6, hosts) == [
        (2, "node1", "no response"), (3, "node1", "no response"), (5, "node2", "no response"),
    ]  # fmt: skip
    assert find_suspects([], 6, hosts) == [(0, "node0", "no response")]
    assert find_suspects([], 6) == [(0, "", "no response")]


def test_suspects_that_respond():
    """A rank that does not wait, or that is behind; nobody if all wait."""
    stuck = state(2, waits_for="", line="b.py:2")
    found = find_suspects([state(0), stuck, state(1)], 3)
    assert found == [(2, "node1", "does not wait for another rank; b.py:2")]
    behind = find_suspects([state(0), state(1), state(2, 6), state(3, 6)], 4)
    assert [suspect.rank for suspect in behind] == [2, 3]
    assert find_suspects([state(0), state(1, line="c.py:3")], 2) == []


def test_suspects_are_written_for_the_job_script(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_own_connection", lambda store: store)
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: None)
    watch = watchdog.Watchdog(dist.HashStore(), 0, 2, 10.0, tmp_path)
    watch.know_hosts(["n0", "n1"])
    monkeypatch.setattr(watch, "_gather_states", lambda own: [own])
    watch._report()
    assert json.loads((tmp_path / "suspects.json").read_text()) == {
        "iteration": 0,
        "suspects": [{"rank": 1, "host": "n1", "why": "no response"}],
    }
    assert "rank 1 on n1: no response" in (tmp_path / "report.txt").read_text()


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("/home/megatron-x/src/megatron_llmjp/training/a.py", "megatron_llmjp/training/a.py"),
        ("/venv/lib/megatron/core/b.py", "megatron/core/b.py"),
        ("/usr/lib/python3.11/threading.py", "python3.11/threading.py"),
        ("a.py", "a.py"),
    ],
)
def test_short_paths(file, shown):
    assert hang_report._short_path(file) == shown


@pytest.mark.parametrize(
    "file",
    [
        "/x/torch/distributed/distributed_c10d.py",
        "/x/megatron/core/pipeline_parallel/p2p_communication.py",
        "/x/megatron/core/distributed/param_and_grad_buffer.py",
        "/x/megatron_llmjp/parallel/process_groups.py",
        "/x/megatron_llmjp/training/stop_signals.py",
    ],
)
def test_a_collective_is_among_the_innermost_four_frames(file):
    def found(*files: str) -> Wait:
        return find_wait([Frame(name, "f") for name in files], on_gpu=False)

    assert found("a.py", file, "b.py", "c.py", "d.py") == "other ranks"
    assert found("a.py", file, "b.py", "c.py", "d.py", "e.py") == ""
    assert found("a.py", "/x/torch/nn/functional.py") == ""


def test_the_state_of_a_thread():
    ready, end = threading.Event(), threading.Event()

    def work() -> None:
        ready.set()
        end.wait()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    assert thread.ident is not None
    found = rank_state(thread.ident, 3, Phase(8, "a save", 21), on_gpu=False)
    end.set()
    thread.join()
    assert (found.rank, found.host, found.iteration, found.phase, found.phases) == (
        3, socket.gethostname(), 8, "a save", 21,
    )  # fmt: skip
    assert found.waits_for == ""
    inner = hang_report._short_path(threading.__file__)
    assert found.line.startswith(f"{inner}:") and found.line.endswith(" in wait")


def test_frames_of_a_stack():
    frames = stack_frames(sys._getframe())
    assert frames[-1] == (__file__, "test_frames_of_a_stack") and len(frames) > 3
    assert stack_frames(None) == []


def test_progress_of_any_rank_is_seen_by_all():
    """A heartbeat counts once; the first count that is read, of another rank, is progress."""
    store = dist.HashStore()
    one, other = (HeartbeatExchange(store, 0.01, on_gpu=False) for _ in range(2))
    one.start()
    other.start()
    wait_until(one.take_progress)  # the first exchange
    wait_until(other.take_progress)
    for exchange in (one, other):
        exchange._activity.advanced = lambda _: False  # type: ignore[method-assign]
    while one.take_progress() or other.take_progress():
        time.sleep(0.05)
    one.beat()
    assert one.take_progress()
    wait_until(other.take_progress)
    wait_until(one.take_progress)  # of the counter, which it incremented itself
    time.sleep(0.05)
    assert not one.take_progress() and not other.take_progress()
    assert store.add(hang_report.PROGRESS_KEY, 0) >= 1
    one.close()
    other.close()
    assert not one._thread.is_alive() and not other._thread.is_alive()


def test_a_store_without_a_server_ends_the_thread():
    class Broken:
        def add(self, key: str, count: int) -> int:
            raise RuntimeError("connection reset")

    exchange = HeartbeatExchange(Broken(), 0.01, on_gpu=False)
    exchange.start()
    wait_until(lambda: not exchange._thread.is_alive())


def test_reading_and_computing_are_activity():
    """I/O always counts, CPU time only where asked for, and more than 2 % of the period."""
    activity = hang_report._ThreadActivity(0.5)
    if not activity._transferred():
        pytest.skip("the kernel does not count the I/O of threads")
    seconds = [100.0]
    activity._cpu_seconds = lambda: seconds[0]  # type: ignore[method-assign]
    transferred = [activity._transferred()]
    activity._transferred = lambda: transferred[0]  # type: ignore[method-assign]
    activity.advanced(True)
    assert not activity.advanced(False) and not activity.advanced(True)
    transferred[0] += 1
    assert activity.advanced(False) and not activity.advanced(False)
    transferred[0] += 1
    assert activity.advanced(True) and not activity.advanced(True)
    seconds[0] += 0.0078125  # below 2 % of half a second
    assert not activity.advanced(True)
    seconds[0] += 0.015625
    assert not activity.advanced(False)
    assert activity.advanced(True) and not activity.advanced(True)


def test_counters_of_the_kernel(tmp_path):
    """CPU time is counted in ticks of 10 ms."""
    assert os.sysconf("SC_CLK_TCK") == 100
    activity = hang_report._ThreadActivity(0.5)
    activity._task = tmp_path
    assert activity._transferred() == 0
    (tmp_path / "io").write_text("rchar: 30\nwchar: 12\nsyscr: 5\nread_bytes: 7\n")
    assert activity._transferred() == 42
    real = hang_report._ThreadActivity(0.5)
    child = os.fork()
    if child == 0:
        time.sleep(600)
    try:
        fields = Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()
        before = (float(fields[11]) + float(fields[12])) / 100
        assert before <= real._cpu_seconds()
        fields[11], fields[12] = "300", "40"
        (tmp_path / "stat").write_text(f"7 (a) b) {' '.join(fields)}")
        assert 3.4 <= activity._cpu_seconds() < 3.5 + before
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_states_are_gathered_until_all_ranks_responded(monkeypatch, world_size):
    """Or until the timeout: the report is not delayed by ranks that have responded."""
    pauses: list[float] = []
    monkeypatch.setattr(watchdog, "_own_connection", lambda store: store)
    monkeypatch.setattr(watchdog, "_run_with_timeout", lambda action, seconds: action())
    watch = watchdog.Watchdog(dist.HashStore(), 0, world_size, 10.0, None)
    others = [state(rank) for rank in range(1, world_size)]
    now = [100.0]

    def pause(seconds: float) -> None:  # another rank responds
        pauses.append(seconds)
        now[0] += seconds
        other = others.pop()
        watch._store.set(f"hang/{other.rank}", json.dumps(asdict(other)))

    monkeypatch.setattr(watchdog.time, "sleep", pause)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    assert watch._gather_states(state(0)) == [state(rank) for rank in range(world_size)]
    assert pauses == [watchdog.GRACE_SECONDS / 10] * (world_size - 1)


def test_a_rank_that_does_not_respond_is_not_waited_for(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watchdog, "_own_connection", lambda store: store)
    monkeypatch.setattr(watchdog, "_run_with_timeout", lambda action, seconds: action())
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])

    def pause(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(watchdog.time, "sleep", pause)
    watch = watchdog.Watchdog(dist.HashStore(), 1, 2, 10.0, None)
    assert watch._gather_states(state(1)) == [state(1)]
    limit = watchdog.GRACE_SECONDS + 2 * watch._timer.period
    assert limit <= now[0] - 100.0 < limit + watchdog.GRACE_SECONDS / 10 + 1e-6
