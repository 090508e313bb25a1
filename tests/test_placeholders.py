"""Planning on a machine without the run's data, tokenizer, packages and folders."""

from __future__ import annotations

import json

import pytest
import yaml

from megatron_llmjp import cli as pretrain_cli
from tests.config.launch_scripts import SCRIPTS
from tests.support.datasets import write_folds
from tests.support.training import arguments

WORLD = {
    "llm-jp-1.3b-v1.0": 96, "llm-jp-13b-v1.0": 96, "llm-jp-3-172b": 512, "llm-jp-4-291b-a27b": 288,
}  # fmt: skip
ABSENT = ("--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", "absent/tok.model")
NOT_CHECKED = "tokenizer absent/tok.model is missing here and is not checked"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command line in an empty folder, on a machine without wandb."""

    def not_reached(*_):
        raise AssertionError("a run was started")

    def find_spec(name):
        assert name in ("wandb", "transformer_engine")

    for name in ("_run_rank", "launch"):
        monkeypatch.setattr(pretrain_cli, name, not_reached)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    # These replace torch.cuda in this process.
    monkeypatch.setattr("megatron_llmjp.planning._build_on_meta", lambda _: "")
    monkeypatch.setattr(pretrain_cli, "check_model", lambda _: [])
    monkeypatch.setattr("megatron_llmjp.placeholders.find_spec", find_spec)
    monkeypatch.chdir(tmp_path)

    def main(*words):
        code = pretrain_cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return main


@pytest.mark.parametrize(
    ("script", "mode"),
    [*((script, "--estimate") for script in SCRIPTS), (SCRIPTS[0], "--suggest-layout")],
    ids=lambda value: getattr(value, "preset", value),
)
def test_a_published_script_is_planned_unchanged(run, tmp_path, script, mode):
    world = WORLD.get(script.preset, 32)
    code, out, err = run(*script.argv, mode, "--world-size", world, "--gpu", "B200")
    assert code == 0, err
    assert f"{world} B200" in out
    assert "the data is missing here and is not checked: data/ja_text_document.idx and " in err
    assert "tokenizer tokenizer.model is missing here and is not checked; the run needs it" in err
    assert "taken from preset llm-jp" in err and "whose model is the same" in err
    assert ("the package wandb is not installed here" in err) == ("--wandb-project" in script.argv)
    assert ("--load base is missing here" in err) == ("--load base" in script.words)
    assert list(tmp_path.iterdir()) == []


def test_sources_of_the_vocabulary_size(run, tmp_path):
    (tmp_path / "data").mkdir()
    folds = write_folds(tmp_path / "data")
    base = arguments("laptop-llama", folds, *ABSENT, vocab_size="", tokenizer_type="")

    def plan(mode, *flags):
        return run(*base, *flags, mode, "--world-size", 1)

    for mode in ("--dry-run", "--plan-data", "--estimate"):
        code, out, err = plan(mode)
        assert code == 2 and out == ""
        assert "pass --vocab-size, --padded-vocab-size, a preset that has it, or a tok" in err
        code, out, err = plan(mode, "--vocab-size", 100)
        assert code == 0 and NOT_CHECKED in err
        code, out, err = plan(mode, "--padded-vocab-size", 128)
        assert code == 0 and "vocabulary size 128 taken from --padded-vocab-size" in err
    made_by = {"type": "Llama2Tokenizer", "vocab_size": 120, "eod_id": 2, "files": {}}
    for prefix in ("ja", "en"):
        path = tmp_path / "data" / f"{prefix}.json"
        path.write_text(json.dumps({"recipe": {"tokenizer": made_by}}))
    code, out, err = plan("--dry-run")
    assert code == 0, err
    assert "vocabulary size 120 taken from" in err and NOT_CHECKED in err


def test_a_dry_run_requires_all_but_tokenizer_and_packages(run, tmp_path):
    (tmp_path / "data").mkdir()
    folds = write_folds(tmp_path / "data")
    words = arguments("laptop-llama", folds, *ABSENT, "--wandb-project", "p", tokenizer_type="")
    code, out, err = run(*words, "--dry-run")
    assert code == 0 and NOT_CHECKED in err and "wandb is not installed here" in err
    # The printed configuration contains no placeholders.
    data = yaml.safe_load(out)["data"]
    assert (data["tokenizer_type"], data["tokenizer_model"]) == (ABSENT[1], ABSENT[3])
    assert yaml.safe_load(out)["logging"]["wandb_project"] == "p"
    code, out, err = run(*words, "--dry-run", "--fold-file", "absent.yaml")
    assert code == 2 and "fold file absent.yaml cannot be read" in err
    code, out, err = run(*words, "--dry-run", "--load", "absent")
    assert code == 2 and "--load absent: no complete checkpoint" in err
    code, out, err = run(*words)
    assert code == 2 and "needs the package wandb" in err


def test_declared_sizes_replace_missing_data(run, tmp_path):
    fold = {"name": "all", "epochs": 1, "blend": {"ja": {"path": "ja"}}}
    content = {"folds": [fold], "datasets": {"ja": {"tokens": "1B"}}}
    (tmp_path / "folds.yaml").write_text(yaml.safe_dump(content))
    words = ("--config", "llm-jp-3-150m", "--fold-file", "folds.yaml", *ABSENT)
    code, out, err = run(*words, "--estimate", "--world-size", 8, "--gpu", "H100")
    assert code == 0, err
    samples = (10**9 - 1) // 4096
    assert f"{samples // 512:,} steps (1 fold)" in out
    assert "datasets are missing here, their declared sizes are used: ja" in err
    code, _, err = run(*words, "--dry-run")
    assert code == 2
    assert "dataset 'ja': ja.idx: no such file" in err
