"""NaN and spikes: skipped steps, their reports, and rollbacks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.schema import FaultsConfig
from megatron_llmjp.report.status import read_status
from megatron_llmjp.training.gradient_monitor import MIN_HISTORY, GradientMonitor, StepStatus
from tests.support.datasets import write_folds
from tests.support.processes import run_ranks
from tests.support.training import TP2, arguments, history

BAD = range(88, 92)
"""Positions of the 23rd batch, whose gradients are changed."""


def train_with_bad_batch(words: list[str], factor: float, rank: int | None) -> int:
    """Train with the gradients multiplied by a factor for batches with a bad position."""
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import find_ranks
    from megatron_llmjp.run import resolve_run
    from megatron_llmjp.training import train as train_module
    from megatron_llmjp.training import train_step, trainer

    here = find_ranks()
    assert here is not None
    trainers: list[trainer.Trainer] = []
    train, update = trainer.Trainer.train, train_step._clip_and_update

    def remember(self):
        trainers[:] = [self]
        return train(self)

    def scaled_update(optimizer, should_apply, hold_update):
        current = trainers[0]
        size = current.sizes.at(current.consumed_samples)
        positions = [
            current.run.schedule.position(current.consumed_samples + i) for i in range(size)
        ]
        if set(positions) & set(BAD) and rank in (None, here.rank):
            for chunk in current.model.chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad.mul_(factor)
        return update(optimizer, should_apply, hold_update)

    trainer.Trainer.train, train_step._clip_and_update = remember, scaled_update
    device = setup()
    config = parse(words).config
    try:
        return train_module.train(resolve_run(config, here.world_size), here, device)
    except trainer.TrainingError as error:
        print(error)
        return 1
    finally:
        torch.distributed.is_initialized() and os.environ.pop("MASTER_PORT", None)


@pytest.fixture(scope="module")
def folds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    return write_folds(folder, (16, 10, 4), repeat=True)


def words(folds: Path, save: Path, *flags: object) -> list[str]:
    common = ["--save", save, "--eval-iters", "0", "--lr-decay-iters", 30, *TP2, *flags]
    return arguments("laptop-llama", folds, *common)


@pytest.mark.long
@pytest.mark.fault(
    "a spike, with --spike-action rollback", "the same losses as with its batches skipped"
)
def test_a_spike_is_rolled_back(folds, tmp_path):
    """The losses equal those of a run that skips the batches; two iterations are missing."""
    flags = ["--spike-action", "rollback", "--spike-skip-iterations", 2, "--save-interval", 20]
    assert run_ranks(train_with_bad_batch, 2, words(folds, tmp_path / "a", *flags), 1e4, None) == [
        1,
        1,
    ]
    status = read_status(tmp_path / "a")
    assert status.state == "failed" and "ended at iteration 28 of 30" in status.why
    assert manifests.complete_iterations(tmp_path / "a") == [16, 20, 24, 28]
    plain = ["--skip-iterations", "22-23"]
    assert run_ranks(train_with_bad_batch, 2, words(folds, tmp_path / "b", *plain), 1.0, None) == [
        0,
        0,
    ]
    rolled, skipped = history(tmp_path / "a"), history(tmp_path / "b")
    assert list(skipped) == list(range(1, 29))
    assert {i: rolled[i] for i in skipped} == skipped


@pytest.mark.long
@pytest.mark.fault(
    "a NaN in the gradients of one rank, once", "not applied, reported; training continues"
)
def test_a_nan_on_one_rank_is_not_applied(folds, tmp_path, capfd):
    save = tmp_path / "nan"
    assert run_ranks(train_with_bad_batch, 2, words(folds, save), float("nan"), 1) == [0, 0]
    warnings = [
        line for line in (save / "metrics.jsonl").read_text().splitlines() if "bad step" in line
    ]
    assert len(warnings) == 1
    assert "fold 'fold01': a NaN or Inf in the gradients" in warnings[0]
    assert re.search("the step is not applied. Documents: (ja|en) ", warnings[0]), warnings[0]
    assert len(history(save)) == 30 and all(loss == loss for loss in history(save).values())


@pytest.mark.long
def test_too_many_nans_end_the_run(folds, tmp_path):
    flags = words(folds, tmp_path / "end", "--max-bad-steps", 1)
    assert run_ranks(train_with_bad_batch, 2, flags, float("inf"), 0) == [1, 1]


def test_classification_of_steps():
    faults = FaultsConfig(spike_action="skip", spike_threshold=5.0, max_bad_steps=2)
    monitor = GradientMonitor(faults)
    assert all(monitor.should_apply(1.0) for _ in range(MIN_HISTORY - 1))
    assert monitor.should_apply(100.0)  # too few recorded norms
    assert monitor.should_apply(4.9) and not monitor.should_apply(5.1)
    assert monitor.status is StepStatus.SPIKE and monitor.history.count(5.1) == 0
    again = GradientMonitor(faults, list(monitor.history))
    assert not again.should_apply(5.1) and not again.needs_rollback
    assert not monitor.should_apply(float("nan")) and not monitor.limit_reached
    assert not monitor.should_apply(float("inf")) and monitor.limit_reached
    assert monitor.should_apply(1.0) and not monitor.limit_reached
    assert GradientMonitor(FaultsConfig(spike_action="off"), [1.0] * 99).should_apply(1e9)
    assert GradientMonitor(FaultsConfig(spike_action="warn"), [1.0] * 99).should_apply(1e9)
