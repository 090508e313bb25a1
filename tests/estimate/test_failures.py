"""Costs of failures, compared with published numbers and with a simulation of the jobs."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.estimate.failure_report import forecast_failures, format_failures
from megatron_llmjp.estimate.failures import (
    FailureModel,
    ObservedJobs,
    best_interval,
    expected_time,
    published_time_between_failures,
    time_between_failures,
)

HOUR = 3600.0
SYNCHRONOUS = FailureModel(6 * HOUR, 300.0, 300.0, 600.0, 120.0)
ASYNCHRONOUS = FailureModel(3 * HOUR, 20.0, 400.0, 900.0, 0.0)
FRAGILE = FailureModel(0.5 * HOUR, 60.0, 200.0, 300.0, 1000.0)


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_best_interval_of_the_paper(hours, minutes):
    """Daly's figures 3 to 5: saves of 5 minutes."""
    model = FailureModel(hours * HOUR, 300.0, 300.0, 600.0, 0.0)
    assert best_interval(model) / 60 == pytest.approx(minutes, rel=0.01)


def test_limits_of_the_best_interval():
    young = math.sqrt(2 * 1.0 * 1e6)
    rare = FailureModel(1e6, 1.0, 1.0, 0.0, 0.0)
    assert best_interval(rare) == pytest.approx(young, rel=1e-3)
    # A save takes more than twice the time between failures.
    assert best_interval(FailureModel(100.0, 201.0, 201.0, 0.0, 0.0)) == 100.0
    # The next save waits until the previous one is complete.
    assert best_interval(replace(rare, save_time=5001.0)) == 5000.0


def simulate(model: FailureModel, interval: float, jobs: int) -> tuple[float, dict[str, float]]:
    """Simulate jobs one event after the other until each fails.

    Returns:
        The wall-clock time per second of training that was saved, and the sums of all times.
    """
    random_numbers = random.Random(1)
    spent = {"saved": 0.0, "wall": 0.0, "queue": 0.0, "restarts": 0.0}
    for _ in range(jobs):
        end = random_numbers.expovariate(1 / model.between_failures)
        spent["queue"] += model.queue
        spent["restarts"] += min(end, model.restart)
        clock, trained, complete = model.restart, 0.0, 0.0
        while clock < end:
            clock += interval
            trained += interval
            if clock + model.save_time <= end:
                complete = trained
            clock += model.save_stall
        spent["saved"] += complete
        spent["wall"] += model.queue + end
    return spent["wall"] / spent["saved"], spent


@pytest.mark.parametrize("model", [SYNCHRONOUS, ASYNCHRONOUS, FRAGILE])
@pytest.mark.parametrize("interval", [500.0, 2000.0])
def test_expected_time_equals_a_simulation(model, interval):
    jobs = 5000
    ratio, spent = simulate(model, interval, jobs)
    found = expected_time(model, 1e6, interval)
    assert found.total / 1e6 == pytest.approx(ratio, rel=0.06)
    assert found.failures / found.total == pytest.approx(jobs / spent["wall"], rel=0.04)
    for name, part in (("queue", found.queue), ("restarts", found.restarts)):
        assert part / found.total == pytest.approx(spent[name] / spent["wall"], rel=0.05), name
    assert found.saves == pytest.approx(1e6 / interval * model.save_stall)
    assert found.lost > 0


@pytest.mark.parametrize("model", [SYNCHRONOUS, ASYNCHRONOUS])
def test_the_best_interval_loses_least(model):
    """Of all; a simulation with the same failures agrees that half and twice of it lose more."""
    best = best_interval(model)
    times = {f: expected_time(model, 1e6, best * f / 100).total for f in range(20, 500, 2)}
    assert abs(min(times, key=times.__getitem__) - 100) <= 4
    half, least, twice = (simulate(model, best * f, 4000)[0] for f in (0.4, 1.0, 2.5))
    assert least < half and least < twice


def test_extremes():
    calm = expected_time(FailureModel(1e12, 10.0, 10.0, 600.0, 60.0), 1e6, 1000.0)
    assert calm.total == pytest.approx(1e6 + 1e4) and calm.failures < 0.01
    # The first save of a job is hardly ever reached.
    hopeless = expected_time(FailureModel(10.0, 1.0, 1.0, 1e5, 0.0), 1e6, 1e4)
    assert 1e100 < hopeless.total < math.inf


def test_published_failures():
    assert published_time_between_failures(16_384) / HOUR == pytest.approx(3.09, abs=0.01)
    assert published_time_between_failures(512) / HOUR == pytest.approx(99.0, abs=0.1)


def test_history_replaces_the_published_rate():
    """Slowly: the published time counts as one failure."""
    assert time_between_failures(100.0, None) == 100.0
    assert time_between_failures(100.0, ObservedJobs(0, 50.0)) == 150.0
    assert time_between_failures(100.0, ObservedJobs(9, 400.0)) == 50.0
    assert time_between_failures(100.0, ObservedJobs(999, 9900.0)) == 10.0


MACHINE = PlannedMachine(512, "H100", None, 8, 0.38)


def test_forecast():
    found = forecast_failures(MACHINE, checkpoint=640 * 10**9, rank_bytes=None)
    assert found.model == FailureModel(
        pytest.approx(99.0 * HOUR, rel=1e-3), 11.0, 11.0, 600.0, 300.0
    )
    assert found.failure_source == "Llama 3: 419 in 54 days on 16,384 H100; scaled to 512"
    assert found.save_source == "at 64.0 GB/s"
    given = replace(
        MACHINE, mtbf_hours=2.0, restart_minutes=0, queue_minutes=7, write_bandwidth=1e9
    )
    found = forecast_failures(given, 640 * 10**9, 40 * 10**9)
    assert found.model == FailureModel(2 * HOUR, 3.0, 641.0, 0.0, 420.0)
    assert (found.failure_source, found.save_source) == ("--mtbf-hours", "at 1.0 GB/s")


def test_forecast_of_a_run_with_history():
    jobs = ObservedJobs(3, 250 * HOUR, queue=90.0, save_time=45.0, save_stall=2.0)
    found = forecast_failures(MACHINE, 640 * 10**9, None, jobs)
    assert found.model == FailureModel(
        pytest.approx(349 * HOUR / 4, rel=1e-3), 2.0, 45.0, 600.0, 90.0
    )
    assert found.failure_source == "3 in 250.0 h of this run, and one in 99.0 h as Llama 3"
    assert found.save_source == "in this run"
    # An explicit rate is more than a guess.
    given = forecast_failures(replace(MACHINE, mtbf_hours=5), 1, None, jobs)
    assert given.model.between_failures == 5 * HOUR
    assert forecast_failures(MACHINE, 64 * 10**9, None, ObservedJobs(0, 1.0)).model.queue == 300.0


def test_text_without_saves_or_length():
    found = forecast_failures(MACHINE, 640 * 10**9, None)
    assert "as configured" not in format_failures(found, 10.0, None, 0)
    assert "as configured" not in format_failures(found, 10.0, 0.0, 0)
    (line,) = [s for s in format_failures(found, 10.0, 864.0, 1).splitlines() if "as conf" in s]
    assert line == "save interval  14.4 min as configured; 46.5 min (279 steps) loses least"
