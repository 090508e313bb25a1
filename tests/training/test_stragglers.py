"""Stragglers: computing times of ranks, their comparison, and slowed ranks in real runs."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.parallel_state import RankGenerator

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.schema import ParallelConfig
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.compute_timer import WINDOW, ComputeTimer, StepTimes
from megatron_llmjp.training.instruments import install_instruments
from megatron_llmjp.training.stragglers import (
    RankPlace,
    StragglerMonitor,
    build_straggler_monitor,
    find_slowest,
    rank_places,
)
from tests.support.datasets import write_folds
from tests.support.processes import run_ranks
from tests.support.training import DISTRIBUTED, OVERLAP, PP2, TP2, Job, arguments, train_on_rank

MIN_STEPS = 5
"""Number of steps after which ranks are compared, instead of 20."""
SECONDS = 10.0
"""Time that a slow rank needs longer, by its clock, in each of the two forward passes of a step."""
SLOWED = {"even": (0, 1), "data": (3,), "pipeline": (3,), "tensor": (2,)}
"""Slow ranks of each run, among all ranks."""


class CpuClock:
    """CPU time of the main thread, which other processes do not change, and pretended delays."""

    def __init__(self):
        self.delay = 0.0

    def perf_counter(self):
        return time.thread_time() + self.delay


def train_with_slow_ranks(jobs, folder):
    """Run all jobs; each forward pass takes longer on the slow ranks of the job."""
    from megatron_llmjp.training import compute_timer, stragglers, train_step

    stragglers.MIN_STEPS = MIN_STEPS
    os.cpu_count = lambda: 64
    compute_timer.time = clock = CpuClock()
    forward = train_step.forward_step
    for job in jobs:
        is_slow = int(os.environ["RANK"]) in SLOWED[job["name"]]

        def slowed(*given, seconds=SECONDS if is_slow else 0.0):
            clock.delay += seconds
            return forward(*given)

        with mock.patch.object(train_step, "forward_step", slowed):
            train_on_rank([job], folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stragglers")
    folds = write_folds(folder, (MIN_STEPS + 1,))
    jobs = [
        Job(name, ranks, tuple(arguments("laptop-llama", folds, *flags, eval_iters=0)))
        for name, ranks, flags in (
            ("even", (0, 2), (*DISTRIBUTED, *OVERLAP)),
            ("data", (2, 4), DISTRIBUTED),
            ("pipeline", (0, 4), (*PP2, *DISTRIBUTED)),
            ("tensor", (0, 4), TP2),
        )
    ]
    run_ranks(train_with_slow_ranks, 4, [asdict(job) for job in jobs], str(folder))
    return {
        name: [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
        for name in SLOWED
    }


@pytest.mark.parametrize(
    ("name", "ranks", "first"),
    [("data", "rank 1", 1), ("pipeline", "rank 3", 3), ("tensor", "ranks 2-3", 2)],
)
def test_a_slowed_rank_is_named(runs, name, ranks, first):
    events = [r for r in runs[name] if r.get("event") == "straggler"]
    assert [(e["iteration"], e["host"]) for e in events] == [(MIN_STEPS, socket.gethostname())]
    assert events[0]["why"].startswith(f"{ranks} on {socket.gethostname()} ")
    last = [r for r in runs[name] if "lm loss" in r][-1]
    assert (last["slowest rank"], last["slowest host"]) == (first, socket.gethostname())
    # The time of a tensor-parallel group is the mean of its two ranks, of which one is delayed.
    assert last["straggler share"] > (0.9 if name != "tensor" else 0.8)
    assert last["longest computing seconds"] > 2 * SECONDS > last["computing seconds"]


def test_no_rank_is_named_in_an_even_run(runs):
    assert [r for r in runs["even"] if r.get("event") == "straggler"] == []
    intervals = [r for r in runs["even"] if "lm loss" in r]
    assert ["straggler share" in r for r in intervals] == [False] * (MIN_STEPS - 1) + [True] * 2
    assert 0.0 <= intervals[-1]["straggler share"] < 0.1
    assert intervals[-1]["computing seconds"] > 2 * SECONDS


@pytest.mark.parametrize("sizes", [(1, 1, 1, 4), (2, 1, 2, 3), (2, 2, 3, 2), (1, 2, 1, 1)])
def test_places_equal_the_groups_of_megatron_core(sizes):
    tensor, context, pipeline, data = sizes
    world = tensor * context * pipeline * data
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        pipeline_model_parallel_size=pipeline,
    )
    places = rank_places([f"host{rank}" for rank in range(world)], parallel)
    assert [place.host for place in places] == [f"host{rank}" for rank in range(world)]
    core = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    expected = {}
    for group in core.get_ranks("pp"):
        expected |= {rank: [stage] for stage, rank in enumerate(group)}
    for group in core.get_ranks("dp"):
        for replica, rank in enumerate(group):
            expected[rank].append(replica)
    assert [[place.stage, place.replica] for place in places] == [expected[r] for r in range(world)]


def places(*stages_and_replicas):
    return [RankPlace(f"node{i}", *place) for i, place in enumerate(stages_and_replicas)]


DP3, DP2_PP2, TP2_DP2 = (
    places((0, 0), (0, 1), (0, 2)),
    places((0, 0), (0, 1), (1, 0), (1, 1)),
    places((0, 0), (0, 0), (0, 1), (0, 1)),
)


@pytest.mark.parametrize(
    ("computing", "where", "expected"),
    [
        ([1.0, 1.5, 1.1], DP3, ((1,), ("node1",), 1.5, 1.1)),
        # the last stage has more work, but only rank 1 is slower than its peer
        ([1.0, 1.2, 2.0, 2.1], DP2_PP2, ((1,), ("node1",), 1.2, 1.0)),
        ([1.0, 1.0, 1.4, 1.6], TP2_DP2, ((2, 3), ("node2", "node3"), 1.5, 1.0)),
        ([1.0, 9.0], places((0, 0), (1, 0)), None),
    ],
)
def test_slowest_of_the_same_work(computing, where, expected):
    found = find_slowest(computing, where)
    shown = found and (found.ranks, found.hosts, found.computing, found.typical)
    assert shown == expected


class Steps:
    """A timer with given numbers of steps."""

    steps = WINDOW
    total = 2.0

    def medians(self):
        return StepTimes(1.0, 0.0, self.total)


def test_a_straggler_is_reported_once_until_all_are_over():
    timer = Steps()
    monitor = StragglerMonitor(timer, DP3, 0.1)
    assert monitor.own == (1.0, 0.0)
    shown = []
    for slow in (
        *([1, 1, 1.3], [1, 1, 1.13], [1.25, 1, 1], [1, 1, 1.25], [1.3, 1, 1]),
        *([1, 1, 1.05], [1, 1, 1.3]),
    ):
        found = monitor.compare([(seconds, 0.0) for seconds in slow])
        shown.append((found.hosts, found.warning.partition(":")[0], found.note))
    over = "no longer slow: ranks 0, 2 on node2, node0; no rank costs 10% of an iteration"
    assert shown == [
        ("node2", "rank 2 on node2 is slow", ""),
        ("node2", "", ""),
        ("node0", "rank 0 on node0 is slow", ""),
        ("node2", "", ""),
        ("node0", "", ""),
        ("node2", "", over),
        ("node2", "rank 2 on node2 is slow", ""),
    ]
    timer.total = 4.0
    found = monitor.compare([(2.0, 0.5), (1.0, 1.5), (1.0, 1.3)])
    assert found.times.computing == 1.0 and found.times.longest_computing == 2.0
    assert (found.times.waiting, found.times.straggler_share) == (1.3, 0.25)
    assert "2 s of computation per iteration, 1 s on other ranks" in found.warning
    assert "25% of the iteration (--straggler-share 0.1)" in found.warning
    timer.steps = WINDOW - 1
    assert monitor.compare([(2.0, 0.5)] * 3) is None


def test_ranks_that_compete_for_cores_are_not_reported():
    config = parse(["--config", "laptop-llama"]).config
    cpu, gpu = Device("cpu", "gloo", "CPU"), Device("cuda", "nccl", "GPU")
    cores = os.cpu_count() // torch.get_num_threads()
    hosts = ["a"] * cores
    for device, crowd, is_reported in ((cpu, 0, True), (cpu, 1, False), (gpu, 9, True)):
        monitor = build_straggler_monitor(config, Steps(), device, [*hosts, *["a"] * crowd, "b"])
        times = [(1.0, 0.0)] * (cores + crowd) + [(3.0, 0.0)]
        found = monitor.compare(times)
        share = pytest.approx(2 / 3) if is_reported else None
        assert (found.hosts, found.times.straggler_share) == ("b" if is_reported else "", share)
        assert bool(found.warning) == is_reported
        assert found.times.longest_computing == 3.0
    off = parse(["--config", "laptop-llama", "--no-log-straggler"]).config
    assert build_straggler_monitor(off, Steps(), cpu, hosts) is None
    core = SimpleNamespace(timers=None)
    for given, is_measured in ((off, False), (config, True)):
        install_instruments(given, [SimpleNamespace(config=core)], cpu, 0, hosts)
        assert (core.timers is not None) == is_measured


class Ticks:
    """A clock that advances by given times; marks are counted."""

    def __init__(self):
        self.now, self.free = 0.0, 0

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start

    def reuse(self, marks):
        self.free += len(marks)


def test_the_timer_separates_computing_from_waiting():
    clock = Ticks()
    timer = ComputeTimer(clock)

    def part(name, seconds):
        timer(name, log_level=2).start()
        clock.now += seconds
        timer(name).stop()

    def step(forward, waiting):
        timer("forward-backward", log_level=1).start(barrier=True)
        for _ in range(2):
            part("forward-compute", forward)
            part("forward-recv", waiting / 2)
            part("backward-compute", 2 * forward)
        timer("forward-backward").stop()

    step(100.0, 100.0)  # a validation
    assert (timer.steps, timer.medians(), clock.free) == (0, (0.0, 0.0, 0.0), 0)
    with timer.step():
        step(1.0, 3.0)
    assert (timer.medians()[:2], clock.free) == ((6.0, 3.0), 10)
    for forward in range(2, WINDOW + 3):
        with timer.step():
            step(float(forward), 1.0)
    assert timer.steps == WINDOW
    assert timer.medians()[:2] == pytest.approx((6 * (3 + WINDOW + 2) / 2, 1.0))
    assert 0.0 < timer.medians().total < 60.0
