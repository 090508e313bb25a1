"""Ranks that fail or are stopped, and two runs on one save folder."""

from __future__ import annotations

import random
import re
import socket

import pytest

from megatron_llmjp.errors import EXIT_FAILURE, EXIT_USER_ERROR

pytestmark = pytest.mark.long

SAME = "the same losses and weights after a restart"


@pytest.mark.fault("an error on one rank", f"all ranks end, its error is printed first; {SAME}")
def test_the_cause_is_printed_first(stage):
    save = stage.folder("raised")
    with stage.started("dp2", save, fault=("raise_at", 5, 1)) as start:
        start.until(lambda: "ZeroDivisionError" in start.stderr)
        # Collectives wait for ten minutes.
        assert start.wait() == EXIT_FAILURE
        first = next(line for line in start.stderr.splitlines() if line.startswith("error:"))
        assert first == "error: rank 1 of 2:"
        assert start.stderr.count("Traceback") == 1
    stage.resume_and_prove("dp2", save)


@pytest.mark.fault("one rank stopped (SIGSTOP)", f"reported, with stacks; exit code 1; {SAME}")
@pytest.mark.parametrize("which", [0, 1])
def test_a_stopped_rank_is_reported(stage, which):
    """The first rank serves the store: the others notice that it does not respond."""
    save, other = stage.folder("stopped"), 1 - which
    limit = ("--hang-timeout-minutes", 0.1)
    code, _, errors = stage.run("tp2-async", save, *limit, fault=("stop_at", 5, which, 2.0))
    assert code == EXIT_FAILURE
    assert "error: no progress for 0.1 minutes at iteration 5" in errors
    silent = f"rank {which} on {socket.gethostname()}: no response"
    assert silent in errors
    assert re.search(rf"rank {other} on .*: iteration 5, a step; waits for other ranks", errors)
    assert "train_step" in (save / "hang" / f"stacks-rank{other:05d}.txt").read_text()
    assert silent in (save / "hang" / "report.txt").read_text()
    stage.resume_and_prove("tp2-async", save)


@pytest.mark.fault(
    "two runs on one save folder", "the second is refused; the first is not affected"
)
@pytest.mark.parametrize("layout", ["alone", "dp2"])
def test_a_second_run_is_refused(stage, layout):
    save = stage.folder("shared")
    reference = stage.reference(layout)
    with stage.started(layout, save) as first:
        first.until(lambda: (save / ".run.json").exists())
        code, _, errors = stage.run("alone", save)
        assert code == EXIT_USER_ERROR
        assert "in use by another run" in errors and "Traceback" not in errors
        assert first.wait() == 0, first.stderr
    stage.prove(layout, save)
    assert reference.is_dir()


@pytest.mark.fault("a NaN in data, a weight or a gradient of one rank", f"not applied; {SAME}")
@pytest.mark.parametrize(
    ("layout", "where", "which"),
    [
        ("alone", "data", 0),
        ("dp2", "data", 1),
        ("alone", "weight", 0),
        ("tp2-async", "weight", 1),
        ("dp2", "gradient", 1),
        ("tp2-async", "gradient", 0),
    ],
)
def test_a_nan_ends_the_run_before_it_is_saved(stage, layout, where, which):
    """A hardware error: with ``--max-bad-steps 1`` a restart repeats the step."""
    save = stage.folder("nan")
    fault = ("nan_at", where, random.Random(where + layout).randint(4, 8), which)
    code, output, errors = stage.run(layout, save, "--max-bad-steps", 1, fault=fault)
    assert code == EXIT_FAILURE
    iteration = fault[2] + 1
    assert f"warning: iteration {iteration}, fold " in output + errors
    assert "a NaN or Inf in the gradients" in output + errors
    assert f"error: iteration {iteration} was the last of too many consecutive bad steps" in errors
    assert "Traceback" not in errors
    stage.resume_and_prove(layout, save)
