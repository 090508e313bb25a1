"""Permanently bad steps: exit code 1, with the last good checkpoint kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE
from megatron_llmjp.report.status import read_status
from tests.faults.stage import LAST, TINY
from tests.faults.start import finish
from tests.support.datasets import write_folds
from tests.support.proof import assert_checkpoints_complete
from tests.support.training import arguments

pytestmark = pytest.mark.long

SAVE_ALL = ("--save-interval", 1, "--keep-last", 1, "--no-save-fold-ends")
OUTCOME = "exit code 1; the last good checkpoint is complete and named in the error"


def records(save: Path) -> list[dict[str, Any]]:
    """Return the records of ``metrics.jsonl``, parsed as strict JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (save / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def assert_failed(save: Path, errors: str, good: int, why: str) -> None:
    """Assert that the run failed, and that its newest checkpoint is the last good one."""
    assert f"the last good checkpoint is {save / manifests.folder_name(good)}" in errors, errors
    assert why in errors and "Traceback" not in errors
    assert manifests.complete_iterations(save)[-1] == good
    assert manifests.read_tracker(save) == (good, [])
    assert_checkpoints_complete(save)
    status = read_status(save)
    assert status.state == "failed" and why in status.why


@pytest.mark.fault(
    "a NaN in one batch of a logged interval",
    "excluded from the mean; the run resumes from its checkpoint",
)
@pytest.mark.parametrize("layout", ["alone", "dp2"])
def test_one_nan_batch(stage, layout):
    save = stage.folder("one-nan")
    flags = ("--save-interval", 6, "--keep-last", 1, "--log-interval", 6, "--no-save-fold-ends")
    fault = ("nan_at", "data", 3, 0)
    code, _, errors = stage.run(layout, save, *flags, "--exit-interval", 6, fault=fault)
    assert code == EXIT_REQUEUE, errors
    last = [record for record in records(save) if "lm loss" in record][-1]
    assert 4.0 < last["lm loss"] < 5.0 and last["grad norm"] > 0.0
    assert (last["skipped iterations"], last["nan iterations"]) == (1, 1)
    kept = manifests.read_manifest(save / "iter_0000006").metrics
    assert kept["lm loss"] == last["lm loss"]
    code, output, errors = stage.run(layout, save, *flags, "--verify-checkpoint")
    assert code == EXIT_DONE, errors
    assert f"resuming from {save / 'iter_0000006'}" in output and "damaged" not in errors
    assert manifests.complete_iterations(save) == [LAST]


@pytest.mark.fault("a NaN in a weight, with --save-interval 1 --keep-last 1", OUTCOME)
@pytest.mark.parametrize(
    ("layout", "which"), [("alone", 0), ("alone-async", 0), ("dp2", 1), ("tp2-async", 1)]
)
def test_a_model_with_nan(stage, layout, which):
    save = stage.folder("nan-weight")
    fault = ("nan_weight_at", "a step", 6, which)
    code, _, errors = stage.run(layout, save, *SAVE_ALL, "--max-bad-steps", 3, fault=fault)
    assert code == EXIT_FAILURE
    assert_failed(save, errors, 6, "iteration 9 was the last of too many consecutive bad steps")
    stage.resume_and_prove(layout, save)


@pytest.mark.fault("a NaN in a weight after the last step", OUTCOME)
@pytest.mark.parametrize(("layout", "which"), [("alone", 0), ("tp2-async", 1)])
def test_a_model_with_nan_while_it_is_saved(stage, layout, which):
    """No step was bad before the save."""
    save = stage.folder("nan-weight-save")
    fault = ("nan_weight_at", "a save", 6, which)
    code, _, errors = stage.run(layout, save, *SAVE_ALL, fault=fault)
    assert code == EXIT_FAILURE
    assert "the checkpoint of iteration 6 was not saved: " in errors
    assert "contains NaN or Inf" in errors
    assert_failed(save, errors, 5, "too many consecutive bad steps")
    stage.resume_and_prove(layout, save)


@pytest.mark.fault("a run that ends in bad steps", OUTCOME)
def test_the_last_step_is_bad(stage):
    """The run is incomplete: a restart repeats the step."""
    save = stage.folder("last-bad")
    code, _, errors = stage.run("alone", save, *SAVE_ALL, fault=("nan_at", "data", LAST - 1, 0))
    assert code == EXIT_FAILURE
    assert_failed(save, errors, LAST - 1, "the run is incomplete")
    stage.resume_and_prove("alone", save)


@pytest.mark.fault("a stop request amid bad steps", "exit code 3; no bad model is saved")
def test_a_stop_amid_bad_steps(stage):
    save = stage.folder("stopped-bad")
    fault = ("nan_at", "data", 5, 0)
    # Without --keep-last, whose removal in the background ends when bad steps begin.
    flags = ("--save-interval", 1, "--no-save-fold-ends", "--exit-interval", 6)
    code, output, errors = stage.run("alone", save, *flags, fault=fault)
    assert code == EXIT_REQUEUE, errors
    assert f"the last good checkpoint is {save / 'iter_0000005'}" in output
    assert manifests.complete_iterations(save) == [1, 2, 3, 4, 5]
    assert read_status(save).state == "stopped"
    stage.resume_and_prove("alone", save)


@pytest.mark.fault("a NaN in the losses of --eval-only", "exit code 1")
def test_a_validation_with_nan(stage):
    save = stage.reference("alone")
    code, output, errors = stage.run("alone", save, "--eval-only", fault=("nan_in_validation",))
    assert code == EXIT_FAILURE and "valid loss: NAN | valid PPL: NAN" in output
    assert f"the loss on validation set 'valid' is nan: the model in {save}/iter_" in errors


FP16 = ("--fp16", "--initial-loss-scale", 1024)


@pytest.mark.fault("fp16 with a permanent NaN", OUTCOME)
@pytest.mark.parametrize(
    ("fault", "flags", "last"),
    [
        pytest.param(("nan_weight_at", "a step", 4), FP16, 6, id="the loss is NaN"),
        pytest.param(
            ("gradients_times", float("nan"), 4),
            (*FP16, "--max-overflow-steps", 3),
            9,
            id="max-overflow-steps",
        ),
        pytest.param(
            ("gradients_times", float("nan"), 4),
            (*FP16, "--min-loss-scale", 512, "--hysteresis", 1),
            7,
            id="min-loss-scale",
        ),
        pytest.param(
            ("gradients_times", float("nan"), 4),
            ("--fp16", "--loss-scale", 1024),
            6,
            id="constant loss scale",
        ),
    ],
)
def test_fp16(stage, fault, flags, last):
    """Overflows that lower the loss scale are not bad steps; saves continue after them."""
    save = stage.folder("fp16")
    limit = ("--max-bad-steps", 2)
    code, _, errors = stage.run("alone", save, *SAVE_ALL, *flags, *limit, fault=fault)
    assert code == EXIT_FAILURE
    assert_failed(
        save, errors, last - 2, f"iteration {last} was the last of too many consecutive bad steps"
    )


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """Fold file of 40 iterations."""
    return write_folds(tmp_path_factory.mktemp("long"), (40,), repeat=True)


def run(folds: Path, save: Path, *flags: Any, fault: Any) -> tuple[int, str, str]:
    common = ("--save", save, "--eval-iters", 0, *SAVE_ALL, *flags)
    words = arguments("laptop-gpt2", folds, *common, **TINY)
    return finish(words, fault)


@pytest.mark.fault("permanently larger gradient norms, with --spike-action skip", OUTCOME)
def test_permanent_spikes(long, tmp_path):
    """The last save is after the first skipped batch; the restart given in the message works."""
    save = tmp_path / "skip"
    fault = ("gradients_times", 1000.0, 22)
    code, output, errors = run(long, save, "--spike-action", "skip", fault=fault)
    assert code == EXIT_FAILURE
    why = "iteration 30 was one of too many skipped spikes (--max-spikes 8 in 128 steps)"
    assert_failed(save, errors, 23, why)
    assert "restart with --spike-action warn or with --spike-threshold above 10" in errors
    assert "number of spikes:   1" in output
    assert read_status(save).spikes == 7
    code, _, errors = run(long, save, "--spike-action", "warn", fault=fault)
    assert code == EXIT_DONE, errors
    assert read_status(save).state == "finished" and read_status(save).iteration == 40


@pytest.mark.fault("permanently larger gradient norms, with --spike-action rollback", OUTCOME)
def test_permanent_rollbacks(long, tmp_path):
    """Batches that the checkpoint was trained on are not skipped."""
    save = tmp_path / "rollback"
    flags = ("--spike-action", "rollback", "--max-rollbacks", 2)
    code, output, errors = run(long, save, *flags, fault=("gradients_times", 1000.0, 22))
    assert code == EXIT_FAILURE
    assert output.count("rolling back to the last checkpoint") == 2
    assert_failed(save, errors, 22, "iteration 23 is a spike after 2 rollbacks (--max-rollbacks 2")
