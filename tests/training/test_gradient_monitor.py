"""What the gradient monitor makes of norms, overflows and spikes."""

from __future__ import annotations

import math

from megatron_llmjp.config.schema import FaultsConfig, OptimizerConfig
from megatron_llmjp.training.gradient_monitor import FEWEST, Judge, Verdict

NAN = math.nan


def test_nothing_is_saved_while_steps_are_bad():
    judge = Judge(FaultsConfig(max_bad_steps=3))
    assert judge.may_take(1.0) and judge.may_save
    assert not judge.may_take(NAN) and not judge.may_save
    judge.begin_step()
    judge.overflowed(OptimizerConfig(), 2.0**20, loss_is_finite=True)
    assert judge.verdict is Verdict.OVERFLOW and not judge.may_save  # nothing was applied since
    assert not judge.may_take(math.inf) and not judge.hopeless
    assert not judge.may_take(NAN) and judge.hopeless and judge.too_many_bad
    assert judge.may_take(1.0) and judge.may_save and not judge.hopeless


def verdicts(optimizer: OptimizerConfig, faults: FaultsConfig, scales: list[float]) -> str:
    """O for a plain overflow, B for a bad step, of overflows that leave these loss scales."""
    judge = Judge(faults)
    found = ""
    for scale in scales:
        judge.begin_step()
        judge.overflowed(optimizer, scale, loss_is_finite=True)
        found += "O" if judge.verdict is Verdict.OVERFLOW else "B"
        assert judge.may_save == ("B" not in found)
    return found


def test_overflows_that_a_lower_loss_scale_cannot_help():
    faults = FaultsConfig()
    halved = [2.0**n for n in range(10, -1, -1)]
    floor = OptimizerConfig(min_loss_scale=0.1)  # no float32
    assert verdicts(floor, faults, [0.4, 0.2, 0.10000000149, 0.10000000149]) == "OOOB"
    assert verdicts(OptimizerConfig(), faults, [*halved, 1.0, 1.0]) == "O" * 11 + "BB"
    assert verdicts(OptimizerConfig(loss_scale=128.0), faults, [128.0] * 2) == "BB"
    limited = FaultsConfig(max_overflow_steps=3)
    assert verdicts(OptimizerConfig(), limited, [2.0**40] * 5) == "OOOBB"
    judge = Judge(faults)
    judge.overflowed(OptimizerConfig(), 2.0**32, loss_is_finite=False)
    assert judge.verdict is Verdict.BAD


def test_overflows_in_a_row_are_counted_across_a_restart():
    faults = FaultsConfig(max_overflow_steps=3)
    judge = Judge(faults)
    for _ in range(3):
        judge.overflowed(OptimizerConfig(), 2.0**20, loss_is_finite=True)
    again = Judge(faults, judge.history)
    again.load_state_dict(judge.state_dict())
    again.overflowed(OptimizerConfig(), 2.0**20, loss_is_finite=True)
    assert again.verdict is Verdict.BAD
    again.load_state_dict({})  # of a checkpoint from before it was counted


def test_skipped_spikes_have_a_limit():
    """One in a row is a batch; two may be the model. They are counted among the last 128 steps."""
    faults = FaultsConfig(spike_action="skip", max_spikes=4)
    judge = Judge(faults)
    assert all(judge.may_take(1.0) for _ in range(FEWEST))
    assert not judge.may_take(50.0) and judge.may_save
    assert not judge.may_take(50.0) and not judge.may_save
    assert judge.may_take(1.0) and judge.may_save
    assert not judge.may_take(50.0) and not judge.hopeless
    again = Judge(faults, judge.history)
    again.load_state_dict(judge.state_dict())
    assert not again.may_take(50.0) and again.hopeless and again.too_many_spikes
    assert all(judge.may_take(1.0) for _ in range(128))
    assert not judge.may_take(50.0) and not judge.hopeless


def test_spikes_that_are_taken_have_none():
    judge = Judge(FaultsConfig(spike_action="warn", max_spikes=1), [1.0] * FEWEST)
    assert judge.may_take(50.0) and judge.verdict is Verdict.SPIKE
    assert judge.may_take(50.0) and judge.may_save and not judge.hopeless
