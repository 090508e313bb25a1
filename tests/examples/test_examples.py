"""``run.sh`` of the examples in a short form, from another folder than the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.timeouts import PROCESS_TIMEOUT

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*/run.sh"))


def run_command(*command, cwd=None, code=0, **settings):
    """Run a command with settings of the environment, and return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": path, **settings},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=3 * PROCESS_TIMEOUT,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def run_example(name, folder, *words, code=0, **settings):
    """Run an example from another folder, and return what it printed."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    environment = {"VIRTUAL_ENV": sys.prefix, **offline, **settings}
    return run_command("bash", EXAMPLES / name, *words, cwd=folder, code=code, **environment)


def validation_losses(text, name):
    """Return the losses on a validation set, in the order of the lines."""
    return [float(x) for x in re.findall(rf"^ validation at.*? {name} loss: (\S+)", text, re.M)]


def test_own_data(tmp_path):
    printed = run_example("own_data/run.sh", tmp_path, "out", ITERATIONS="2")
    rejected = (tmp_path / "out" / "own_rejected.csv").read_text()
    assert "ja.jsonl,74,not valid JSON" in rejected
    row = next(line for line in printed.splitlines() if line.startswith("total  "))
    documents, _, _, _, _, bad, _, _, short, copies = row.split()[1:]
    assert (documents, bad, short, copies) == ("117", "1", "1", "4")  # 72 and 45 in the corpus
    assert (tmp_path / "out" / "checkpoints" / "iter_0000002").is_dir()
    again = run_example("own_data/run.sh", tmp_path, "out", code=2)
    assert "error: out exists: remove it" in again


def test_reproduce(tmp_path):
    printed = run_example("reproduce_llm-jp-13b-v1.0/run.sh", tmp_path)
    assert "96 A100 40GB: TP 1 x PP 8 x DP 12" in printed
    assert "sbatch" in printed


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A model of the examples, hardly trained."""
    folder = tmp_path_factory.mktemp("small_model")
    run_example("small_model.sh", folder, "small", MODEL_ITERATIONS="2")
    return folder / "small"


@pytest.mark.long
def test_continual_pretraining(tmp_path, small_model):
    settings = {"MODEL": str(small_model / "model"), "ITERATIONS": "4"}
    printed = run_example("continual_pretraining/run.sh", tmp_path, "out", **settings)
    losses = validation_losses(printed.split("Done: validation losses")[1], "own")
    assert losses[1] < losses[0]
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.long
def test_long_context(tmp_path, small_model):
    """From 128 to 512 positions, over two context-parallel ranks, and to transformers."""
    yarn = "--yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 128"
    settings = {
        "MODEL": str(small_model / "model"),
        "TEXT": str(small_model / "corpus" / "code.jsonl"),
        "LENGTH": "512",
        "SCALING": f"--position-embedding-type yarn {yarn}",
        "ITERATIONS": "4",
        "TRAINING": "--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --device cpu",
        "SAMPLES": "2",
    }
    printed = run_example("long_context/run.sh", tmp_path, "out", **settings)
    assert "max_position_embeddings: the weights were trained with 128, now 512" in printed
    assert "1 x 512 tokens in fp32" in printed
    last = re.search(r"^ +256-511 +(\S+) +(\S+) +(\S+)$", printed, re.M)
    assert last is not None, printed
    before, after, native = map(float, last.groups())
    assert after < before and native == pytest.approx(after, abs=1e-5)
    found = re.search(r"largest difference of a token's loss.*: (\S+)", printed)
    assert found is not None and float(found[1]) <= 1e-5


@pytest.mark.long
@pytest.mark.skipif(find_spec("trl") is None, reason="the extra `examples` is not installed")
def test_sft(tmp_path, small_model):
    settings = {"MODEL": str(small_model / "checkpoints"), "TRAINING": "--max-steps 2"}
    printed = run_example("sft/run.sh", tmp_path, "out", **settings)
    compared = re.search(
        r"largest difference of the logits from base and adapter.*: (\S+)", printed
    )
    assert compared is not None
    assert float(compared[1]) < 1e-4


@pytest.mark.long
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `examples` is not installed")
def test_evaluation(tmp_path, small_model):
    printed = run_example("evaluation/run.sh", tmp_path, "out", MODEL=str(small_model / "model"))
    assert re.search(r"completions.*\bacc\b", printed)
    assert len(validation_losses(printed, "ja")) == 2  # printed again at the end


@pytest.mark.long
def test_inference(tmp_path, small_model):
    settings = {"MODEL": str(small_model / "checkpoints"), "TOKENS": "5"}
    run_example("inference/run.sh", tmp_path, "out", **settings)
    lines = (tmp_path / "out" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_readme_names_the_settings(script):
    """Each example is in the table of examples, and its README shows its settings."""
    readme = (script.parent / "README.md").read_text(encoding="utf-8")
    assert f"examples/{script.parent.name}/run.sh" in readme
    assert f"({script.parent.name}/README.md)" in (EXAMPLES / "README.md").read_text("utf-8")
    for setting in re.findall(r"^([A-Z_]+)=\$\{\1:-", script.read_text("utf-8"), re.M):
        assert re.search(rf"\b{setting}\b", readme), setting
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_warnings():
    scripts = [*SCRIPTS, EXAMPLES / "common.sh", EXAMPLES / "small_model.sh"]
    words = [
        "shellcheck",
        "-x",
        "--severity=warning",
        "--exclude=SC2086,SC2206",
        *map(str, scripts),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def losses(text):
    """Return the loss of each iteration in a log."""
    found = re.findall(r" iteration +(\d+)/.*?lm loss: (\S+)", text)
    return {int(iteration): float(loss) for iteration, loss in found}


def test_migrate_from_megatron_lm(tmp_path):
    """A checkpoint of Megatron-LM itself, continued with the losses that it recorded."""
    fixtures = ROOT / "tests" / "parity" / "fixtures" / "llama_small"
    printed = run_example(
        "migrate_from_megatron-lm/run.sh",
        tmp_path,
        "out",
        CHECKPOINT=str(fixtures / "iter_0000010"),
        TRAIN_DATA_PATH=str(shutil.copytree(fixtures, tmp_path / "data") / "small_text_document"),
        TOKENIZER_ARGS="--tokenizer-type NullTokenizer --vocab-size 500",
    )
    recorded = json.loads((fixtures / "golden_tp1pp1.json").read_text())["iterations"]
    expected = {r["iteration"]: r["lm_loss"] for r in recorded if r["iteration"] > 10}
    assert losses(printed) == pytest.approx(expected, abs=1e-6)
    assert "note: --use-mpi is not needed here" in printed


@pytest.mark.long
@pytest.mark.parametrize("program", ["megatron-lm", "megatron-deepspeed"])
def test_migrate(tmp_path, program):
    """The run that the example makes, continued with the losses of the uninterrupted run."""
    check_only = {"DRY_RUN_ONLY": "1"} if program == "megatron-deepspeed" else {}
    printed = run_example(f"migrate_from_{program}/run.sh", tmp_path, "out", **check_only)
    log = tmp_path / "out" / "training.log"
    if check_only:
        assert not log.exists()
        log.write_text(run_command("bash", "-c", printed.split("Start the run:\n")[1]))
    old = losses((tmp_path / "out" / "old" / "training.log").read_text())
    new = losses(log.read_text())
    assert sorted(new) == list(range(11, 21))
    assert new == pytest.approx({i: old[i] for i in new}, abs=1e-6)
