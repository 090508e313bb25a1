"""Runs on paper as a user meets them: what is printed, and the exit code."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest

from tests.support.processes import run_ranks

UNEVEN = "--decoder-first-pipeline-num-layers 4 --decoder-last-pipeline-num-layers 2"
COMMANDS = {
    "172b": "--config llm-jp-3-172b --rehearse --world-size 512",
    "13b-v1.0": "--config llm-jp-13b-v1.0 --rehearse --world-size 96 --gpu A100 --gpu-memory 40GB",
    "interleaved": "--config llm-jp-3-1.8b --rehearse --world-size 8 --gpu H200 "
    "--pipeline-model-parallel-size 4 --virtual-pipeline-model-parallel-size 3",
    "neox, uneven": "--config rinna-japanese-gpt-neox-3.6b --rehearse --world-size 16 --bf16 "
    f"--pipeline-model-parallel-size 4 --num-layers 16 {UNEVEN} --global-batch-size 16",
    "too large": "--config llm-jp-3-13b --rehearse --world-size 4 --gpu A100 --gpu-memory 40GB",
    "cannot be": "--config llm-jp-3-13b --rehearse --world-size 6",
    "no vocabulary": "--config laptop-llama --rehearse --world-size 2",
    "no world": "--config llm-jp-3-13b --rehearse",
    "strange GPU": "--config llm-jp-3-13b --rehearse --world-size 128 --gpu Voodoo2",
    "suggest": "--config llm-jp-13b-v1.0 --suggest-layout --gpus 96 --gpu A100 --gpu-memory 40GB",
    "suggest 1.3b": "--config llm-jp-1.3b-v1.0 --suggest-layout --gpus 96 --gpu-memory 40GB",
    "suggest 13b": "--config llm-jp-3-13b --suggest-layout --gpus 128",
    "suggest 172b": "--config llm-jp-3-172b --suggest-layout --gpus 512",
    "hopeless": "--config llm-jp-3-172b --suggest-layout --gpus 8",
}


def run_all(commands: dict[str, str]) -> dict[str, Any]:
    """Exit code, output and errors of each command, in one process."""
    from megatron_llmjp.entry import main

    found = {}
    for name, command in commands.items():
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(command.split())
        found[name] = [code, output.getvalue(), errors.getvalue()]
    return found


@pytest.fixture(scope="module")
def results():
    return run_ranks(run_all, 1, COMMANDS)[0]


def test_the_172b(results):
    code, output, _ = results["172b"]
    assert code == 0
    for words in (
        "512 H100: TP 4 x PP 16 x DP 8, 216 micro-batches",
        "169,947,181,056 without embeddings",
        "2,962,243,584",  # the first stage's, with 99,840 rows
        "2,655,535,104",
        "2,962,255,872",
        "480-511  60-63  91-96+L",
        "7,077,888 tokens",
        "pipeline bubble 6.5%",
        "about 2,000 steps a day",
        "16 distinct ranks were set up",
    ):
        assert words in output, words


@pytest.mark.parametrize("name", ["13b-v1.0", "interleaved", "neox, uneven"])
def test_other_layouts_are_built_as_planned(results, name):
    code, output, errors = results[name]
    assert code == 0, errors
    assert "distinct ranks were set up" in output and "fits:" in output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too large", "do not fit"),
        ("cannot be", "6"),
        ("no vocabulary", "--vocab-size"),
        ("no world", "--world-size N"),
        ("strange GPU", "Voodoo2"),
    ],
)
def test_what_cannot_run(results, name, words):
    code, _, errors = results[name]
    assert code == 2 and words in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("suggest", "TP 1 x PP 8 x DP 12 (given)"),
        ("suggest 1.3b", "TP 1 x PP 1 x DP 96 (given)"),
        ("suggest 13b", "TP 2 x PP 2 x DP 32 (given)"),
        ("suggest 172b", "TP 4 x PP 16 x DP 8 (given)"),
    ],
)
def test_published_layouts_are_found(results, name, shape):
    code, output, errors = results[name]
    assert code == 0, errors
    assert shape in output and "flags of the best" in output


def test_nothing_fits(results):
    code, output, _ = results["hopeless"]
    assert code == 2 and "no layout fits" in output
