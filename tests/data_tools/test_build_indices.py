"""build_indices: all indices of a run, built in advance."""

from __future__ import annotations

import json
import multiprocessing
import os

from data_tools.build_indices import main
from megatron_llmjp.data.folds import datasets as fold_datasets
from tests.data.test_index_check import poke
from tests.support.datasets import write_folds
from tests.support.forks import warm_context


def test_indices_are_built_once_and_repaired(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: warm_context())
    folds = write_folds(tmp_path, (2, 3, 1))
    flags = f"--fold-file {folds} --seq-length 16 --global-batch-size 8 --workers 2".split()
    report = tmp_path / "report.json"
    assert main([*flags, "--report", str(report)]) == 0
    cache = tmp_path / "index_cache"
    assert "built 6 of 6 indices" in capsys.readouterr().out
    table = {(row["fold"], row["dataset"]): row for row in json.loads(report.read_text())}
    # fold00 needs the first epoch of both datasets, fold01 and fold02 continue it.
    assert [table["fold00", name]["built"] for name in ("(order)", "ja", "en")] == [1, 1, 1]
    assert [table["fold01", name]["built"] for name in ("(order)", "ja", "en")] == [1, 0, 0]
    assert table["total", ""]["samples"] == (2 + 3 + 1) * 8
    bytes_on_disk = sum(
        p.stat().st_size
        for p in cache.glob("*/*")
        if p.suffix != ".json" or p.name == "contents.json"
    )
    assert table["total", ""]["bytes"] == bytes_on_disk

    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    assert main(flags) == 0
    assert f"all 6 indices exist in {cache}" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before

    damaged = next(cache.rglob("*document_index.npy"))
    good = damaged.read_bytes()
    os.truncate(damaged, 200)
    damaged.write_bytes(
        good[:-1] + bytes([good[-1] ^ 1])
    )  # the same size: detected only by --verify
    assert main(flags) == 0
    assert main([*flags, "--verify"]) == 0
    assert "built 1 of 6" in capsys.readouterr().out
    assert damaged.read_bytes() == good


def test_a_computed_order_needs_no_index(tmp_path, capsys, monkeypatch):
    """The datasets are checked, which a run would do in the background."""
    monkeypatch.setattr(fold_datasets, "MAX_CHECKED_SEQUENCES", 0)
    folds = write_folds(tmp_path, (2, 3))
    folds.write_text(f"shuffle: blocks\n{folds.read_text()}")
    flags = f"--fold-file {folds} --seq-length 16 --global-batch-size 8".split()
    assert main(flags) == 0
    out, err = capsys.readouterr()
    assert "the sample order needs no indices" in out and "entries of 3 datasets" in err
    facts = [json.loads(p.read_text()) for p in (tmp_path / "index_cache").rglob("*.json")]
    assert [known["checked"] for known in facts] == [True] * 3
    assert main([*flags, "--folds", "fold7"]) == 2
    assert "the folds are fold00, fold01" in capsys.readouterr().err
    poke(tmp_path / "en", "lengths", 20, 10**6)
    assert main(flags) == 2
    assert "en.idx: sequence 20: 1,000,000 tokens at byte" in capsys.readouterr().err


def test_errors_are_reported(tmp_path, capsys):
    folds = write_folds(tmp_path, (2, 3))
    flags = f"--fold-file {folds} --seq-length 16 --global-batch-size 8".split()
    assert main([*flags, "--folds", "fold7"]) == 2
    assert "the folds are fold00, fold01" in capsys.readouterr().err
    assert main([*flags, "--report", "table.txt"]) == 2
    assert main([*flags, "--no-such-flag"]) == 2
    assert main(["--seq-length", "16"]) == 2
    assert "--fold-file" in capsys.readouterr().err
