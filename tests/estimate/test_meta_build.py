"""``--estimate`` from the command line to its output and exit code, with the meta build."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_llmjp.errors import UserError
from tests.config.launch_scripts import GPT2_BPE
from tests.estimate.test_flops import preset
from tests.support.datasets import write_folds
from tests.support.processes import ROOT, run_ranks
from tests.support.tokenizer_files import write_gpt2

UNEVEN = "--decoder-first-pipeline-num-layers 4 --decoder-last-pipeline-num-layers 2"
WITH_DATA = (
    "--estimate --world-size 4 --tensor-model-parallel-size 2 --config laptop-llama "
    "--vocab-size 100 --seq-length 32 --global-batch-size 4 --micro-batch-size 1 --eval-iters 1 "
    "--lr-warmup-iters 2 --save /nowhere/run --save-interval 4 --keep-last 2 "
    "--no-masked-softmax-fusion --fold-file"
)
COMMANDS = {
    "172b": "--config llm-jp-3-172b --estimate --world-size 512",
    "interleaved": "--config llm-jp-3-1.8b --estimate --world-size 8 --gpu H200 "
    "--pipeline-model-parallel-size 4 --virtual-pipeline-model-parallel-size 3",
    "neox, uneven": "--config rinna-japanese-gpt-neox-3.6b --estimate --world-size 16 --bf16 "
    f"--pipeline-model-parallel-size 4 --num-layers 16 {UNEVEN} --global-batch-size 16",
    "folds": f"{WITH_DATA} FOLDS --tokenizer-type NullTokenizer",
    "folds, no tokenizer": f"{WITH_DATA} FOLDS",
    "no folds": f"{WITH_DATA} /nowhere/folds.yaml --tokenizer-type NullTokenizer",
    "too large": "--config llm-jp-3-13b --estimate --world-size 4 --gpu A100-40GB",
    "cannot be": "--config llm-jp-3-13b --estimate --world-size 6",
    "no vocabulary": "--config laptop-llama --estimate --world-size 2",
    "no world": "--config llm-jp-3-13b --estimate",
    "strange GPU": "--config llm-jp-3-13b --estimate --world-size 128 --gpu Voodoo2",
}
SCRIPTS = sorted((ROOT / "slurm").glob("pretrain_*.sh"))
"""Slurm scripts, each for the GPUs that its model was trained on."""


def run_all(commands: dict[str, list[str]]) -> dict[str, Any]:
    """Run all commands in one process; return exit code, stdout and stderr of each."""
    from megatron_llmjp.cli import main

    found = {}
    for name, command in commands.items():
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(command)
        found[name] = [code, output.getvalue(), errors.getvalue()]
    return found


def words_of(script: Path, *flags: str) -> list[str]:
    """Return the arguments that a Slurm script passes to pretrain_gpt.py outside of Slurm."""
    env = {**os.environ, "PYTHON": "echo", "MEGATRON_LLMJP": str(ROOT)}
    done = subprocess.run(["bash", str(script), *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program, *words = done.stdout.split()
    assert program == str(ROOT / "pretrain_gpt.py")
    return words


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folds = write_folds(tmp_path_factory.mktemp("data"))
    commands = {k: v.replace("FOLDS", str(folds)).split() for k, v in COMMANDS.items()}
    vocab, merges = write_gpt2(folds.parent / "gpt2-vocab.json", folds.parent / "gpt2-merges.txt")
    gpt2 = GPT2_BPE.replace(vocab.name, str(vocab)).replace(merges.name, str(merges))
    commands["GPT-2 BPE"] = [*gpt2.split(), "--estimate", "--world-size", "16"]
    commands |= {script.name: words_of(script, "--estimate") for script in SCRIPTS}
    return run_ranks(run_all, 1, commands)[0]


def test_a_script_of_gpt2s_vocabulary(results):
    """Its tokenizer is read without its type, its data is not here."""
    code, output, errors = results["GPT-2 BPE"]
    assert code == 0, errors
    assert "padded vocabulary size 384" in output  # 350 tokens, padded to a multiple of 128
    assert "the data is missing here" in errors


def test_172b(results):
    code, output, _ = results["172b"]
    assert code == 0
    for words in (
        "512 H100: TP 4 x PP 16 x DP 8; 216 micro-batches of size 1 per replica and step",
        "169,947,181,056 without embeddings",
        "2,962,243,584",  # first stage, padded vocabulary size 99,840
        "2,655,535,104",
        "2,962,255,872",
        "480-511  n60 d0-1  n61 d2-3  n62 d4-5  n63 d6-7",
        "7,077,888 tokens",
        "pipeline bubble 6.5%",
        "about 2,000 steps per day on 512 H100: 34% MFU",
        "ranks 0, 32, 480",
    ):
        assert words in output, words


@pytest.mark.parametrize("name", ["interleaved", "neox, uneven"])
def test_other_layouts_match_the_estimate(results, name):
    code, output, errors = results[name]
    assert code == 0, errors
    assert "built on the meta device" in output and "fits:" in output


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_slurm_scripts_outside_slurm(results, script):
    code, output, errors = results[script.name]
    assert code == 0, errors
    assert "built on the meta device" in output and "fits:" in output
    nodes, gpus = ("n11 ", "96 A100") if script.stem.endswith("-v1.0") else ("n", " ")
    assert nodes in output and gpus in output.splitlines()[0]


def test_with_data(results):
    """15 iterations in three folds: saves at 4, 6 (fold end), 8, 11 (fold end), 12 and 15.

    The last two and those at fold ends are kept.
    """
    code, output, errors = results["folds"]
    assert code == 0, errors
    assert "15 steps (3 folds), 1.92K tokens" in output
    assert "written, 4 kept" in output
    assert "note: --no-masked-softmax-fusion" in errors and "tokenizer" not in errors
    code, output, errors = results["folds, no tokenizer"]
    assert code == 0 and "no tokenizer is given; the run needs one" in errors
    code, output, errors = results["no folds"]
    assert code == 0 and "TP 2 x PP 1 x DP 2" in output
    assert "the data is missing here and is not checked: /nowhere/folds.yaml" in errors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too large", "do not fit into GPU memory"),
        ("cannot be", "6"),
        ("no vocabulary", "--vocab-size"),
        ("no world", "--world-size N"),
        ("strange GPU", "Voodoo2"),
    ],
)
def test_invalid_runs(results, name, words):
    code, _, errors = results[name]
    assert code == 2 and words in errors and "Traceback" not in errors


def build_wrong_layouts() -> dict[str, str]:
    """Build a model in layouts whose ranks or parameters are not megatron-core's."""
    from megatron_llmjp.estimate import meta_build
    from megatron_llmjp.estimate.layout import ParallelLayout, make_layout

    values = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
              "global_batch_size": 8, "micro_batch_size": 1, "vocab_size": 1000}  # fmt: skip
    config = preset("laptop-llama", **values)
    right = make_layout(config, 8)
    ranks = ParallelLayout.rank
    found = {}

    def message() -> str:
        try:
            meta_build.build_first_ranks(config, right)
        except UserError as error:
            return str(error)
        return "built"

    def wrong(axis: int):
        """Ranks of one axis are twice as far apart."""
        return lambda self, *places, **named: (
            ranks(self, *places, **named)
            + (places[axis] * ranks(self, *(n == axis for n in range(4))) if places else 0)
        )

    found["right"] = message()
    for axis, name in ((0, "tensor"), (2, "data"), (3, "pipeline")):
        with mock.patch.object(ParallelLayout, "rank", wrong(axis)):
            found[name] = message()
    with mock.patch.object(meta_build, "rank_parameters", lambda *_: 12_345):
        found["parameters"] = message()
    return found


def test_differences_from_megatron_core_are_errors():
    (found,) = run_ranks(build_wrong_layouts, 1)
    assert found["right"] == "built"
    group = "the {}-parallel group of rank 0 is {}; the estimate has steps of {}"
    assert found["tensor"] == group.format("tensor", [0, 1], 2)
    assert found["data"] == group.format("data", [0, 2], 4)
    assert found["pipeline"] == group.format("pipeline", [0, 4], 8)
    assert found["parameters"].startswith("stage 0 has ")
    assert found["parameters"].endswith(" parameters per rank; the estimate is 12,345")
