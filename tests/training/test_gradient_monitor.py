"""Classification of steps by the gradient monitor: norms, overflows and spikes."""

from __future__ import annotations

import math
from types import SimpleNamespace

from megatron_llmjp.config.schema import FaultsConfig, OptimizerConfig
from megatron_llmjp.training.gradient_monitor import (
    MIN_HISTORY,
    GradientMonitor,
    Rollback,
    StepStatus,
    count_rollbacks,
)

NAN = math.nan


def test_nothing_is_saved_while_steps_are_bad():
    monitor = GradientMonitor(FaultsConfig(max_bad_steps=3))
    assert monitor.should_apply(1.0) and monitor.may_save
    assert not monitor.should_apply(NAN) and not monitor.may_save
    monitor.begin_step()
    monitor.record_overflow(OptimizerConfig(), 2.0**20, loss_is_finite=True)
    assert (
        monitor.status is StepStatus.OVERFLOW and not monitor.may_save
    )  # nothing was applied since
    assert not monitor.should_apply(math.inf) and not monitor.limit_reached
    assert not monitor.should_apply(NAN) and monitor.limit_reached and monitor.too_many_bad_steps
    assert monitor.should_apply(1.0) and monitor.may_save and not monitor.limit_reached


def classify(optimizer: OptimizerConfig, faults: FaultsConfig, scales: list[float]) -> str:
    """Return O for each overflow and B for each bad step, given the loss scales after the steps."""
    monitor = GradientMonitor(faults)
    found = ""
    for scale in scales:
        monitor.begin_step()
        monitor.record_overflow(optimizer, scale, loss_is_finite=True)
        found += "O" if monitor.status is StepStatus.OVERFLOW else "B"
        assert monitor.may_save == ("B" not in found)
    return found


def test_overflows_that_a_lower_loss_scale_cannot_help():
    faults = FaultsConfig()
    halved = [2.0**n for n in range(10, -1, -1)]
    floor = OptimizerConfig(min_loss_scale=0.1)  # not exact in float32
    assert classify(floor, faults, [0.4, 0.2, 0.10000000149, 0.10000000149]) == "OOOB"
    assert classify(OptimizerConfig(), faults, [*halved, 1.0, 1.0]) == "O" * 11 + "BB"
    assert classify(OptimizerConfig(loss_scale=128.0), faults, [128.0] * 2) == "BB"
    limited = FaultsConfig(max_overflow_steps=3)
    assert classify(OptimizerConfig(), limited, [2.0**40] * 5) == "OOOBB"
    monitor = GradientMonitor(faults)
    monitor.record_overflow(OptimizerConfig(), 2.0**32, loss_is_finite=False)
    assert monitor.status is StepStatus.BAD


def test_an_applied_step_ends_a_row_of_overflows():
    """At the minimum a second overflow in a row is bad, and more than the limit are."""
    at_minimum = (OptimizerConfig(), 1.0, True)
    monitor = GradientMonitor(FaultsConfig(max_overflow_steps=2))
    for _ in range(3):
        monitor.record_overflow(*at_minimum)
        assert monitor.status is StepStatus.OVERFLOW
        assert monitor.should_apply(1.0) and monitor.status is StepStatus.GOOD
    for expected in (StepStatus.OVERFLOW, StepStatus.BAD):
        monitor.record_overflow(*at_minimum)
        assert monitor.status is expected
    assert monitor.should_apply(1.0)
    for expected in (StepStatus.OVERFLOW, StepStatus.OVERFLOW, StepStatus.BAD):
        monitor.record_overflow(OptimizerConfig(), 2.0**20, True)
        assert monitor.status is expected


def test_the_threshold_of_a_spike():
    """More than the threshold times the median, which needs a history."""
    faults = FaultsConfig(spike_action="skip", spike_threshold=10.0)
    monitor = GradientMonitor(faults, [1.0] * (MIN_HISTORY - 1))
    assert monitor.should_apply(1000.0)  # too little history
    assert monitor.median_norm == 1.0
    assert monitor.should_apply(10.0) and monitor.status is StepStatus.GOOD
    assert not monitor.should_apply(10.001) and monitor.status is StepStatus.SPIKE
    assert math.isnan(GradientMonitor(faults).median_norm)
    off = GradientMonitor(FaultsConfig(spike_action="off"), [1.0] * MIN_HISTORY)
    assert off.should_apply(1e9) and off.status is StepStatus.GOOD


def test_overflows_in_a_row_are_counted_across_a_restart():
    faults = FaultsConfig(max_overflow_steps=3)
    monitor = GradientMonitor(faults)
    for _ in range(3):
        monitor.record_overflow(OptimizerConfig(), 2.0**20, loss_is_finite=True)
    again = GradientMonitor(faults, monitor.history)
    again.load_state_dict(monitor.state_dict())
    again.record_overflow(OptimizerConfig(), 2.0**20, loss_is_finite=True)
    assert again.status is StepStatus.BAD
    again.load_state_dict({})  # older checkpoints have no counters


def test_skipped_spikes_have_a_limit():
    """One skipped spike allows saves, two in a row do not; the limit is within 128 steps."""
    faults = FaultsConfig(spike_action="skip", max_spikes=4)
    monitor = GradientMonitor(faults)
    assert all(monitor.should_apply(1.0) for _ in range(MIN_HISTORY))
    assert not monitor.should_apply(50.0) and monitor.may_save
    assert not monitor.should_apply(50.0) and not monitor.may_save
    assert monitor.should_apply(1.0) and monitor.may_save
    assert not monitor.should_apply(50.0) and not monitor.limit_reached
    again = GradientMonitor(faults, monitor.history)
    again.load_state_dict(monitor.state_dict())
    assert not again.should_apply(50.0) and again.limit_reached and again.too_many_spikes
    assert all(monitor.should_apply(1.0) for _ in range(128))
    assert not monitor.should_apply(50.0) and not monitor.limit_reached


def test_applied_spikes_have_no_limit():
    monitor = GradientMonitor(FaultsConfig(spike_action="warn", max_spikes=1), [1.0] * MIN_HISTORY)
    assert monitor.should_apply(50.0) and monitor.status is StepStatus.SPIKE
    assert monitor.should_apply(50.0) and monitor.may_save and not monitor.limit_reached


def test_keys_of_rollbacks_in_checkpoints():
    """Manifests of earlier versions have them, next to the iterations that users skipped."""
    stored = {"positions 32-40": (32, 40), "9-10": (32, 40), "12": (44, 48)}
    run = SimpleNamespace(history=SimpleNamespace(skipped_iterations=stored))
    assert count_rollbacks(run) == 1
    assert Rollback(9, (32, 40)).key == "positions 32-40"
