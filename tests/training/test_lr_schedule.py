"""The learning rate of every iteration, against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_llmjp.config.flags import parse
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.schema import FoldLearningRate
from megatron_llmjp.errors import UserError
from megatron_llmjp.training.optimizer import LearningRateSchedule, RunScheduler

BATCH, LENGTH, ITERS = 4, 8, 50
PEAK, LOW, WARMUP, END, TAIL = 3e-3, 1e-4, 5, 40, 10

MODEL = ("--num-layers", 1, "--hidden-size", 8, "--num-attention-heads", 1)
BASE = {
    "--global-batch-size": BATCH,
    "--seq-length": LENGTH,
    "--lr": PEAK,
    "--min-lr": LOW,
    "--lr-warmup-iters": WARMUP,
    "--lr-decay-iters": END,
}


def rates(*flags, folds=(), total=ITERS * BATCH, **changes):
    """Rates for flags over BASE; a change to None takes a flag away."""
    values = {**BASE, **{f"--{k.replace('_', '-')}": v for k, v in changes.items()}}
    words = [w for flag, value in values.items() if value is not None for w in (flag, value)]
    config = parse([str(word) for word in (*MODEL, *words, *flags)]).config
    sizes = BatchSizeSchedule(config)
    return LearningRateSchedule(config, schedule(folds, total), sizes, ITERS), sizes


def schedule(folds, total):
    """Folds of ``(samples, learning rate)``; one plain fold when there is none."""
    plans, first = [], 0
    for samples, own in folds or [(total, None)]:
        plan = SimpleNamespace(name=f"fold{len(plans)}", first_sample=first, learning_rate=own)
        first = plan.end = first + samples
        plans.append(plan)

    return SimpleNamespace(folds=plans, sample_range=lambda plan: (plan.first_sample, plan.end))


def part(done, start=WARMUP, end=END):
    return (done - start) / (end - start)


def tail(done, shape):
    start = END - TAIL
    return PEAK if done <= start else LOW + (PEAK - LOW) * shape((done - start) / TAIL)


DECAYS = {
    ("constant",): lambda n: PEAK,
    ("linear",): lambda n: LOW + (PEAK - LOW) * (1 - part(n)),
    ("cosine",): lambda n: LOW + (PEAK - LOW) * (1 + math.cos(math.pi * part(n))) / 2,
    ("inverse-square-root",): lambda n: max(LOW, PEAK * math.sqrt(WARMUP / n)),
    ("WSD", "linear"): lambda n: tail(n, lambda x: 1 - x),
    ("WSD", "cosine"): lambda n: tail(n, lambda x: (1 + math.cos(math.pi * x)) / 2),
    ("WSD", "exponential"): lambda n: tail(n, lambda x: 2 * 0.5**x - 1),
    ("WSD", "minus_sqrt"): lambda n: tail(n, lambda x: 1 - math.sqrt(x)),
}


@pytest.mark.parametrize("style", DECAYS, ids="-".join)
def test_styles(style):
    flags = ["--lr-decay-style", style[0]]
    if style[0] == "WSD":
        flags += ["--lr-wsd-decay-style", style[1], "--lr-wsd-decay-iters", TAIL]
    found, _ = rates(*flags)
    for iteration in range(1, ITERS + 1):
        done = iteration - 1  # the first iteration applies the rate of no step done
        expected = DECAYS[style](done) if done > WARMUP else PEAK * done / WARMUP
        if done > END and style != ("constant",):
            expected = LOW
        assert found.at(iteration) == pytest.approx(expected, rel=1e-9), iteration


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_warmup_samples": WARMUP * BATCH, "lr_decay_samples": END * BATCH},
        {"lr_warmup_tokens": WARMUP * BATCH * LENGTH, "lr_decay_tokens": END * BATCH * LENGTH},
        {"lr_warmup_fraction": WARMUP / END},
        {"lr_decay_fraction": END / ITERS},
        {"lr_wsd_decay_samples": TAIL * BATCH},
        {"lr_wsd_decay_tokens": TAIL * BATCH * LENGTH},
        {"lr_wsd_decay_fraction": TAIL / END},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_units(changes):
    style = ("--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear")
    expected, _ = rates(*style, lr_wsd_decay_iters=TAIL)
    if any("lr_decay" in name for name in changes):
        changes = {**changes, "lr_decay_iters": None}
    if not any("wsd" in name for name in changes):
        changes = {**changes, "lr_wsd_decay_iters": TAIL}
    if any("warmup" in name for name in changes):
        changes = {**changes, "lr_warmup_iters": None}
    found, _ = rates(*style, **changes)
    every = range(1, ITERS + 1)
    assert [found.at(i) for i in every] == pytest.approx([expected.at(i) for i in every])


@pytest.mark.parametrize(("fraction", "steps"), [(1e-9, 1), (1.5 / ITERS, 2), (None, ITERS)])
def test_a_fraction_of_the_run_is_a_whole_iteration(fraction, steps):
    found, _ = rates("--lr-decay-style", "linear", lr_warmup_iters=None, lr_decay_iters=None,
                     lr_decay_fraction=fraction)  # fmt: skip
    expected = [max(LOW, PEAK + (LOW - PEAK) * n / steps) for n in range(4)]
    assert [found.at(n + 1) for n in range(4)] == pytest.approx(expected)


def test_ramp_up_counts_samples():
    """The rate follows the samples; the iterations of the ramp-up are smaller steps on it."""
    found, sizes = rates("--rampup-batch-size", 1, 1, 30, "--lr-decay-style", "linear")
    for iteration in range(1, ITERS):
        n, warmup, end = map(sizes.consumed_after, (iteration - 1, WARMUP, END))
        expected = PEAK * n / warmup
        if n > warmup:
            expected = LOW + (PEAK - LOW) * (1 - part(min(n, end), warmup, end))
        assert found.at(iteration) == pytest.approx(expected), iteration


def test_folds_have_schedules_of_their_own():
    own = FoldLearningRate(lr=1e-3, min_lr=1e-4, lr_decay_style="linear", lr_warmup_iters=2)
    last = FoldLearningRate(lr_decay_style="WSD", lr_wsd_decay_style="linear", lr_wsd_decay_iters=4)
    # The second fold begins inside iteration 11, the third inside iteration 21.
    found, _ = rates(folds=[(42, None), (39, own), (119, last)])
    without, _ = rates()
    for iteration in range(1, 12):
        assert found.at(iteration) == without.at(iteration)
    for iteration in range(12, 22):
        n = iteration - 12
        expected = 1e-3 * n / 2 if n <= 2 else 1e-4 + 9e-4 * (1 - (n - 2) / 8)
        assert found.at(iteration) == pytest.approx(expected), iteration
    for iteration in range(22, 51):
        n = iteration - 22  # of 29 iterations; no warm-up of its own
        expected = PEAK if n <= 25 else LOW + (PEAK - LOW) * (29 - n) / 4
        assert found.at(iteration) == pytest.approx(expected), iteration
    # The run's schedule continues after a fold with its own, as if there had been none.
    for folds in ([(40, None), (40, own), (120, None)], [(42, None), (39, own), (119, None)]):
        found, _ = rates(folds=folds)
        for iteration in range(22, 51):
            assert found.at(iteration) == without.at(iteration), iteration
    found, _ = rates(folds=[(40, None), (40, own), (120, None)])
    assert [found.at(i) for i in (10, 21)] == [without.at(i) for i in (10, 21)]
    assert [found.at(i) for i in (11, 13)] == [0.0, 1e-3] and found.at(20) == pytest.approx(
        2.125e-4
    )


def test_scheduler_applies_the_rates_and_grows_weight_decay():
    folds = [(100, None), (100, FoldLearningRate(lr=1e-3, lr_decay_style="constant"))]
    growing = ("--start-weight-decay", 0.0, "--end-weight-decay", 0.1)
    found, sizes = rates(
        *growing, "--weight-decay-incr-style", "linear", "--rampup-batch-size", 2, 2, 20,
        folds=folds,
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    no_decay = {"params": [torch.nn.Parameter(torch.zeros(1))], "wd_mult": 0.0, "max_lr": 9.9}
    optimizer.add_param_group(no_decay)
    scheduler = RunScheduler(optimizer, found)
    consumed = 0
    for iteration in range(1, 40):
        decayed, other = optimizer.param_groups
        assert decayed["lr"] == other["lr"] == found.at(iteration)
        assert other["weight_decay"] == 0.0
        assert decayed["weight_decay"] == pytest.approx(0.1 * consumed / sizes.consumed_after(50))
        scheduler.step(sizes.at(consumed))
        consumed = sizes.consumed_after(iteration)
    assert scheduler.num_steps == consumed

    again = RunScheduler(optimizer, found)
    again.load_state_dict(scheduler.state_dict())
    assert again.num_steps == consumed
    assert optimizer.param_groups[0]["lr"] == found.at(40)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"min_lr": 1e-2}, "fold 'fold0', learning_rate: min_lr 0.01 is above lr 0.003"),
        (
            {"lr_warmup_iters": 10},
            "'fold0', learning_rate: lr_warmup_samples 40 must be smaller",
        ),
        ({"lr_decay_style": "WSD"}, "lr_wsd_decay_iters"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 11}, "which includes it: shorten"),
        ({"lr": 1e-3, "lr_warmup_init": 2e-3}, "lr_warmup_init 0.002 is above lr 0.001"),
    ],
)
def test_contradictory_settings_raise(own, words):
    with pytest.raises(UserError, match=words):
        rates(folds=[(40, FoldLearningRate(**own)), (160, None)])
