"""Fit of the step-time model: known parameters are recovered, and written as a module."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest

from benchmarks.step_time import fit as fits
from benchmarks.step_time.published_runs import load_runs, seconds_per_step
from megatron_llmjp.estimate.speed.fitted_step_time import FITTED
from megatron_llmjp.estimate.speed.step_parameters import ModelAccuracy, StepParameters
from megatron_llmjp.estimate.speed.step_time import step_time

TRUE = replace(FITTED, ampere_products=0.8, product_traffic=250.0, link=0.7, stragglers=0.03)
START = np.log(astuple(FITTED))


@pytest.fixture(scope="module")
def synthetic():
    """Published configurations with the seconds of known parameters."""
    runs = [run for run in load_runs() if run.fitted][::3]
    return [replace(r, seconds=step_time(r.load, r.gpu, TRUE).total) for r in runs]


def test_known_parameters_are_recovered(synthetic):
    assert np.max(abs(fits.log_errors(synthetic, START))) > 0.05
    logs = fits.PUBLISHED_RUNS.fit(synthetic, START)
    assert np.max(abs(fits.log_errors(synthetic, logs))) < 0.005
    found = StepParameters(*np.exp(logs))
    assert found.ampere_products == pytest.approx(0.8, rel=0.05)
    assert found.stragglers == pytest.approx(0.03, rel=0.1)


def test_a_wrong_run_is_not_hidden_by_the_fit_to_the_others(synthetic):
    """It is predicted from the others, which agree with each other."""
    few = synthetic[::3]
    wrong = [replace(few[0], seconds=2 * few[0].seconds), *few[1:]]
    errors = fits.PUBLISHED_RUNS.left_out_errors(
        wrong, np.log(astuple(TRUE)), [r.name for r in wrong]
    )
    assert errors[0] == pytest.approx(np.log(0.5), abs=0.02)


def test_accuracy_and_the_written_module():
    """Of eleven errors from -5 % to 5 % of predicted by published seconds."""
    errors = np.log1p(np.linspace(-0.05, 0.05, 11))
    found = fits.accuracy(errors)
    assert (found.runs, found.median, found.percentile_90) == (11, 0.03, 0.05)
    assert found.low == pytest.approx(1 / 1.04, abs=1e-3)
    assert found.high == pytest.approx(1 / 0.96, abs=1e-3)
    corrected = replace(found, runs=3)
    module: dict[str, object] = {}
    exec(fits._written(FITTED, found, corrected), module)
    written = [module[name] for name in ("FITTED", "ACCURACY", "CORRECTED_ACCURACY")]
    assert written == [FITTED, found, corrected]
    assert isinstance(module["ACCURACY"], ModelAccuracy)


def test_another_run_of_the_group_corrects_the_error():
    """Of three runs 10, 12 and 11 % too slow; a group of one has no other run."""
    errors = np.log([1.10, 1.12, 1.11, 1.5, 0.8, 1.6])
    found = fits.corrected_errors(errors, ["a", "a", "a", "b", "c", "c"])
    assert len(found) == 5 * 2
    expected = np.log([110 / 112, 110 / 111, 112 / 110, 112 / 111, 111 / 110, 111 / 112])
    assert found[:6] == pytest.approx(expected)
    assert found[6:] == pytest.approx(np.log([0.5, 0.5, 2.0, 2.0]))


def test_formulas_are_named():
    run = load_runs()[0]
    with pytest.raises(ValueError, match="unknown formula steps"):
        seconds_per_step("steps", 1.0, run.load.config, 1, run.gpu)
