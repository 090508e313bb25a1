"""Warnings on documents that several datasets share."""

from __future__ import annotations

import json

import numpy as np
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools import plan_folds, split_folds
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.estimate.shared_documents import shared_document_warnings
from tests.support.datasets import write_dataset
from tests.support.processes import pretrain
from tests.support.training import arguments


def test_folds_and_refined_overlap(tmp_path, capsys):
    """Folds are disjoint; a refined subset shares documents with each of them."""
    write_dataset(tmp_path / "d", 400, seed=1)
    (tmp_path / "best.txt").write_text("\n".join(map(str, range(0, 400, 5))))
    words = ["--input", str(tmp_path / "d"), "--output-dir", str(tmp_path), "--folds", "2"]
    assert split_folds.main([*words, "--refined-list", str(tmp_path / "best.txt")]) == 0
    names = ("fold00", "fold01", "refined")
    folds = [{"name": n, "epochs": 1, "blend": {"d": {"path": f"{n}/d"}}} for n in names]
    path = tmp_path / "folds.yaml"
    path.write_text(yaml.safe_dump({"folds": folds[:2]}))
    assert shared_document_warnings(read_fold_file(path)) == []
    path.write_text(yaml.safe_dump({"folds": folds}))
    owner = np.arange(400) % 2
    np.random.RandomState(1234).shuffle(owner)  # as in split_folds
    assigned = [int((owner[::5] == fold).sum()) for fold in (0, 1)]
    assert sum(assigned) == 80
    found = shared_document_warnings(read_fold_file(path))
    assert len(found) == 2
    for count, text in zip(assigned, found, strict=True):
        assert f"share a .bin and {count} documents, of 80" in text
    flags = ["--fold-file", str(path), "--seq-length", "64", "--global-batch-size", "4"]
    assert plan_folds.main(flags) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert found[0] in shown
    assert plan_folds.main([*flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    epochs = {use["path"].split("/")[-2]: use["epochs"] for use in plan["datasets"]}
    lengths = np.array([len(tokens) for tokens in IndexedDataset(str(tmp_path / "d"))])
    best = np.arange(400) % 5 == 0
    for name, mine in (("fold00", owner == 0), ("fold01", owner == 1), ("refined", best)):
        others = {"refined": best}
        if name == "refined":
            others = {"fold00": owner == 0, "fold01": owner == 1}
        tokens = lengths[mine].sum()
        times = epochs[name] + sum(
            epochs[other] * lengths[mine & documents].sum() / tokens
            for other, documents in others.items()
        )
        text = (
            f"tokens of {tmp_path}/{name}/d are used {times:.2f} times: {epochs[name]:.2f} epochs"
        )
        assert any(warning.startswith(text) for warning in plan["warnings"])
    (too_large,) = shared_document_warnings(read_fold_file(path), largest=1)
    assert "run plan_folds" in too_large
    for more in ([], ["--dry-run"]):
        result = pretrain(*arguments("laptop-llama", path, "--train-iters", "4", *more))
        assert result.returncode == 0, result.stderr
        printed = [line for line in result.stderr.splitlines() if "share a .bin" in line]
        assert printed == [f"warning: {text}" for text in found]
