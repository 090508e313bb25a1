"""Plans of examples/reproduce_*, compared with the published numbers."""

from __future__ import annotations

import json

import pytest

from data_tools import plan_folds
from tests.support.processes import ROOT

LLM_JP_3_TOKENS = 2_072_488_058_295
"""Tokens of all datasets times their epochs, as in the comments of the published launch scripts."""


def planned(capsys, preset, example):
    words = ["--config", preset, "--fold-file", str(ROOT / "examples" / example / "folds.yaml")]
    assert plan_folds.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_llm_jp_13b_v1(capsys):
    """Repositories llm-jp-13b-v1.0-mdsfmt-itr87870 and -mdsfmt; tokens of the model card."""
    plan = planned(capsys, "llm-jp-13b-v1.0", "reproduce_llm-jp-13b-v1.0")
    assert [fold["last_iteration"] for fold in plan["folds"]][-2:] == [87_870, 96_657]
    used = {}
    for fold in plan["folds"][:10]:
        assert 27e9 < fold["tokens"] < 28e9
        for dataset in fold["datasets"]:
            used[dataset["name"]] = used.get(dataset["name"], 0) + dataset["tokens"]
    card = {"ja_wiki": 1.5, "ja_mc4": 136, "en_wiki": 5, "en_pile": 135, "code_stack": 10}
    total = sum(used.values())
    assert {name: tokens / total for name, tokens in used.items()} == pytest.approx(
        {name: billions / 287.5 for name, billions in card.items()}, rel=1e-3
    )


@pytest.mark.parametrize(
    ("model", "iterations", "batch"),
    [("1.8b", 988_240, 512), ("13b", 494_120, 1024), ("172b", 292_812, 1728)],
)
def test_llm_jp_3(capsys, model, iterations, batch):
    """Iterations of the launch scripts: tokens / 4096 / batch size, rounded up."""
    plan = planned(capsys, f"llm-jp-3-{model}", "reproduce_llm-jp-3")
    assert plan["folds"][0]["iterations"] == iterations == -(-LLM_JP_3_TOKENS // (4096 * batch))
    datasets = plan["folds"][0]["datasets"]
    assert len(datasets) == 113
    assert sum(dataset["tokens"] for dataset in datasets) == pytest.approx(
        LLM_JP_3_TOKENS, rel=2e-6
    )
    epochs = {dataset["name"]: dataset["epochs"] for dataset in datasets}
    for name, value in epochs.items():
        twice = name.startswith("ja_") and "pdf-e02" not in name
        assert value == pytest.approx(2 if twice else 1, rel=1e-4), name
