"""Stop requests at critical moments, and changes of the clock during a run."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.errors import EXIT_REQUEUE

pytestmark = pytest.mark.long

OUTCOME = "exit code 3, with a checkpoint if training had started; the same losses and weights"


@pytest.mark.fault("SIGTERM during start-up", OUTCOME)
@pytest.mark.parametrize(
    "function", ["parallel.rendezvous.rendezvous", "training.run_setup.build_model"]
)
def test_signal_during_start_up(stage, function):
    """No incomplete files remain, and the run can be restarted."""
    save = stage.folder("stopped-early")
    fault = ("signal_in_function", int(signal.SIGTERM), function)
    assert stage.run("alone", save, fault=fault)[0] == EXIT_REQUEUE
    stage.resume_and_prove("alone", save)


@pytest.mark.fault("SIGTERM to a rank and its data workers", OUTCOME)
def test_signal_to_all_processes(stage):
    """As sent by the launcher and Slurm: data workers continue until the rank has saved."""
    save = stage.folder("stopped-all")
    fault = ("signal_group_at", int(signal.SIGTERM), "a step", 4)
    code, output, errors = stage.run("alone-async", save, fault=fault)
    assert code == EXIT_REQUEUE, errors
    assert "Traceback" not in errors
    stopped = manifests.complete_iterations(save)[-1]
    assert f"stopped at iteration {stopped}: signal received" in output
    stage.resume_and_prove("alone-async", save, unfinished=stopped)


@pytest.mark.fault("SIGTERM while a rank waits in C++ code", OUTCOME)
@pytest.mark.parametrize("layout", ["alone", "dp2"])
def test_signal_in_cpp_code(stage, layout):
    """Python signal handlers do not run there."""
    save = stage.folder("stopped-waiting")
    fault = ("hang_in_function", "training.run_setup.open_datasets")
    ranks = 1 if layout == "alone" else 2
    with stage.started(layout, save, fault=fault) as start:
        start.until(lambda: start.stdout.count("waiting forever") == ranks)
        os.kill(start.pid, signal.SIGTERM)
        assert start.wait() == EXIT_REQUEUE, start.stderr
        assert "stopped: received SIGTERM; nothing new to save" in start.stdout
        assert "Traceback" not in start.stderr


@pytest.mark.fault(
    "--exit-duration-in-mins reached before the first step", "exit code 3, nothing lost"
)
@pytest.mark.parametrize(
    ("layout", "minutes", "fault"),
    [
        ("dp2", 0.3, ("hang_in_function", "training.run_setup.open_datasets")),
        ("alone", 0.05, ("hang_in_function", "training.run_setup._verify_share")),
        ("alone", 0.05, ("hang_in_function", "checkpoint.sharded_state.load_checkpoint")),
        ("alone", 30, ("start_time_ago", 3600.0)),
    ],
)
def test_time_limit_before_the_first_step(stage, layout, minutes, fault):
    """The limit counts from the launcher's start; nothing is saved again."""
    save = stage.folder("late")
    assert stage.run(layout, save, "--exit-interval", 3)[0] == EXIT_REQUEUE
    before = (save / manifests.TRACKER).stat().st_mtime_ns
    flags = ("--exit-duration-in-mins", minutes, "--verify-checkpoint")
    code, output, errors = stage.run(layout, save, *flags, fault=fault)
    assert code == EXIT_REQUEUE, errors
    assert "stopped: --exit-duration-in-mins reached; nothing new to save" in output
    assert "Traceback" not in errors and "stopped at iteration" not in output
    assert (save / manifests.TRACKER).stat().st_mtime_ns == before
    stage.resume_and_prove(layout, save)


@pytest.mark.parametrize(
    ("layout", "phase", "iteration", "number"),
    [
        pytest.param(*case[:4], marks=pytest.mark.fault(f"{case[4]} during {case[1]}", OUTCOME))
        for case in (
            ("alone", "a validation", 5, signal.SIGTERM, "SIGTERM"),
            ("dp2", "a save", 3, signal.SIGTERM, "SIGTERM"),
            ("alone-async", "a save", 4, signal.SIGTERM, "SIGTERM"),
            ("tp2-async", "a step", 4, signal.SIGUSR1, "SIGUSR1"),
            ("alone", "a step", 4, signal.SIGUSR2, "SIGUSR2"),
            ("alone", "a save", 6, signal.SIGHUP, "SIGHUP"),
        )
    ],
)
def test_signal_during_training(stage, layout, phase, iteration, number):
    """With two ranks, only the second gets the signal: both agree, save and end."""
    save = stage.folder("stopped")
    which = 1 if layout in ("dp2", "tp2-async") else 0
    fault = ("signal_at", int(number), phase, iteration, which)
    code, output, errors = stage.run(layout, save, fault=fault)
    assert code == EXIT_REQUEUE, errors
    assert "Traceback" not in errors
    stopped = manifests.complete_iterations(save)[-1]
    assert f"stopped at iteration {stopped}: signal received" in output
    assert iteration <= stopped <= iteration + 2
    stage.resume_and_prove(layout, save, unfinished=stopped)


@pytest.mark.fault(
    "clock changed by an hour in every iteration",
    "no early stop or save; the same losses and weights",
)
def test_clock_changes(stage):
    """Changes of an hour in nearly every iteration cause no early stop or save."""
    save = stage.folder("clock")
    flags = ("--exit-duration-in-mins", 30, "--save-interval-minutes", 20)
    flags = (*flags, "--hang-timeout-minutes", 25)
    code, _, errors = stage.run("alone", save, *flags, fault=("set_clock", 3600.0))
    assert code == 0, errors
    reference = manifests.complete_iterations(stage.reference("alone"))
    assert manifests.complete_iterations(save) == reference
    stage.prove("alone", save)
