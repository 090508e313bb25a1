"""Declared sizes of datasets, compared with plans of real files and with the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from data_tools import plan_folds
from data_tools.run_flags import parse_run_flags
from megatron_llmjp.data.indexed_dataset import bin_path, idx_path, read_index
from megatron_llmjp.errors import UserError
from megatron_llmjp.run_data import resolve_data
from tests.support.datasets import write_folds

ROOT = Path(__file__).parents[2]
FLAGS = ["--seq-length", "32", "--global-batch-size", "8"]
NAMES = ("ja", "en", "valid")


def plan(capsys, file: Path, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = plan_folds.main(["--fold-file", str(file), *FLAGS, *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def declare(file: Path, sizes: dict[str, int | str]) -> None:
    """Declare sizes in an included file in another folder."""
    lists = file.parent / "lists"
    lists.mkdir(exist_ok=True)
    declared = {name: {"tokens": tokens} for name, tokens in sizes.items()}
    (lists / "sizes.yaml").write_text(yaml.safe_dump({"root": "..", "datasets": declared}))
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "include": "lists/sizes.yaml"}))


def sizes_of(folder: Path) -> dict[str, int]:
    return {name: read_index(folder / name).tokens for name in NAMES}


def remove(folder: Path, *names: str) -> None:
    for name in names:
        idx_path(folder / name).unlink()
        bin_path(folder / name).unlink()


def test_the_plan_is_that_of_files_of_the_declared_sizes(tmp_path, capsys):
    file = write_folds(tmp_path, repeat=True)
    _, before, _ = plan(capsys, file, "--json")
    sizes = sizes_of(tmp_path)
    declare(file, sizes)
    remove(tmp_path, "ja", "valid")
    code, out, err = plan(capsys, file, "--json")
    assert code == 0, err
    found, expected = json.loads(out), json.loads(before)
    for fold in (*found["folds"], *expected["folds"]):
        declared = {row["name"]: row.pop("declared") for row in fold["datasets"]}
        assert declared == {"ja": fold in found["folds"], "en": False}
        for row in fold["datasets"]:
            row["path"] = Path(row["path"]).resolve()
    for row in (*found["datasets"], *expected["datasets"]):
        row["path"] = Path(row["path"]).resolve()
    assert found == expected
    _, out, _ = plan(capsys, file)
    assert "ja (declared)" in out and "en (declared)" not in out
    assert "declared: 1 of 2 datasets have no files here" in out


def test_a_run_requires_the_files(tmp_path):
    file = write_folds(tmp_path)
    declare(file, sizes_of(tmp_path))
    remove(tmp_path, "ja")
    with pytest.raises(UserError, match=r"fold 'fold00', dataset 'ja': .*no such file"):
        resolve_data(parse_run_flags(["--fold-file", str(file), *FLAGS], "run").config)


def test_a_plan_names_what_is_neither_there_nor_declared(tmp_path, capsys):
    file = write_folds(tmp_path)
    declare(file, {"ja": 1000})
    remove(tmp_path, "ja", "en")
    code, _, err = plan(capsys, file)
    assert code == 2
    assert "dataset 'en'" in err and "dataset 'ja'" not in err
    assert "declare sizes: `datasets: {PATH: {tokens: N}}`" in err
    idx_path(tmp_path / "ja").touch()  # half of a dataset is damage
    assert "dataset 'ja'" in plan(capsys, file)[2]


@pytest.mark.parametrize(("factor", "code"), [(1.009, 0), (0.991, 0), (1.02, 2), (0.98, 2)])
def test_sizes_are_compared_when_the_files_appear(tmp_path, capsys, factor, code):
    file = write_folds(tmp_path)
    sizes = sizes_of(tmp_path)
    declared = int(sizes["en"] / factor)
    declare(file, {**sizes, "en": declared})
    found, _, err = plan(capsys, file)
    assert found == code, err
    if code:
        message = f"en has {sizes['en']:,} tokens, {declared:,} are declared"
        assert message in err and f"({factor - 1:+.1%})" in err
        with pytest.raises(UserError, match="are declared"):
            resolve_data(parse_run_flags(["--fold-file", str(file), *FLAGS], "run").config)


def test_parts_of_a_split_are_planned(tmp_path, capsys):
    file = tmp_path / "folds.yaml"
    blend = {"ja": {"path": "ja"}}
    fold = {"name": "all", "order": "megatron", "split": "9,1", "iterations": 50, "blend": blend}
    datasets = {"ja": {"tokens": "20K"}}
    file.write_text(yaml.safe_dump({"folds": [fold], "datasets": datasets}))
    code, out, err = plan(capsys, file, "--json")
    assert code == 0, err
    (row,) = json.loads(out)["folds"][0]["datasets"]
    assert row["epochs"] == 50 * 8 / ((18_000 - 1) // 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [ja]", "line 1: datasets: expected `PATH: {tokens: ...}`"),
        ("datasets: {ja: {tokens: 0}}", "ja, tokens: must be greater than 0"),
        ("datasets: {ja: {token: 1}}", "unknown key; did you mean 'tokens'?"),
        ("datasets:\n  ja: {tokens: 1}\n  ./ja: {tokens: 1}", "ja is declared twice"),
        ("datasets: {$NOT_SET/ja: {tokens: 1}}", "the environment variable NOT_SET is not set"),
    ],
)
def test_invalid_declarations(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    Path("folds.yaml").write_text(
        f"{text}\nfolds: [{{name: a, epochs: 1, blend: {{ja: {{path: ja}}}}}}]\n"
    )
    code, _, err = plan(capsys, Path("folds.yaml"))
    assert code == 2
    assert message in err


def test_the_example_plans_as_documented(capsys):
    """Without data; 96,657 iterations and the learning rates are those of the published run."""
    example = ROOT / "examples/reproduce_llm-jp-13b-v1.0/folds.yaml"
    code = plan_folds.main(["--config", "llm-jp-13b-v1.0", "--fold-file", str(example)])
    printed = capsys.readouterr().out
    assert code == 0
    documented = (ROOT / "docs/folds.md").read_text().split("folds 1 to 8 are omitted here")[1]
    block = documented.split("```")[1].strip("\n").splitlines()
    lines = [line for line in block if line != "..."]
    assert len(lines) == 19
    for line in lines:
        assert line in printed.splitlines()
