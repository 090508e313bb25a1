"""Failed saves are reported, survived, and leave no incomplete files; also asynchronous ones."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_llmjp.parallel.launcher import free_port
from tests.checkpoint.saves import save_on_rank
from tests.support.datasets import write_folds
from tests.support.processes import run_ranks
from tests.support.training import DISTRIBUTED, arguments
from tests.support.witness import assert_files_match_manifest, read_weights


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Output of the two ranks, and their save folder."""
    folder = tmp_path_factory.mktemp("saver")
    folder.chmod(0o755)
    words = arguments("laptop-llama", write_folds(folder), *DISTRIBUTED)
    ranks = run_ranks(save_on_rank, 2, str(folder), words, str(free_port()))
    return folder, ranks


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_good_save(told, kind):
    folder, (first, second) = told
    good = first[f"{kind} good"]
    name = folder / kind / "iter_0000001"
    assert good["text"].startswith(f"saved checkpoint {name} in ")
    assert second[f"{kind} good"]["text"] == ""
    # An asynchronous save is renamed and reported only when it is complete.
    assert good["before"] == (["iter_0000001"] if kind == "sync" else [])
    assert good["names"] == ["iter_0000001"]
    assert good["tracker"] == "1"
    saved, loaded, counters = first[f"{kind} value"]
    assert saved == loaded
    assert counters == {"counter": [1]}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_weights_of_the_call_are_saved(told, kind):
    """Not those of the next step, which an asynchronous save overlaps with."""
    folder, _ = told
    expected = torch.load(folder / f"{kind}.pt", weights_only=True)
    found = read_weights(folder / kind / "iter_0000002")
    norms = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_",
             "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}  # fmt: skip
    for local, stored in norms.items():
        expected = {name.replace(local, stored): value for name, value in expected.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_failed_save(told, kind):
    folder, (first, second) = told
    failed = first[f"{kind} limited"]
    assert "error: the checkpoint of iteration 2 was not saved: " in failed["text"]
    assert f"File too large: {folder / kind / '.iter_0000002.tmp'}" in failed["text"]
    assert "Training continues" in failed["text"]
    assert second[f"{kind} limited"]["text"] == ""
    # Leftovers of the failed save and a killed run are removed; the last good one is unchanged.
    assert failed["names"] == ["iter_0000001"]
    assert failed["tracker"] == "1"
    assert "closed" not in failed
    again = first[f"{kind} again"]
    assert again["text"].startswith("saved checkpoint ")
    assert again["tracker"] == "2"


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_read_only_folder(told, kind):
    _, (first, _) = told
    failed = first[f"{kind} read-only"]
    assert "was not saved: Permission denied: " in failed["text"]
    assert failed["tracker"] == "4"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_old_ones_are_removed(told, kind):
    """Iteration 2 ended a fold; of the others, the newest one is kept."""
    folder, (first, _) = told
    assert first[f"{kind} again"]["names"] == ["iter_0000002"]
    assert first[f"{kind} third"]["names"] == ["iter_0000002", "iter_0000003"]
    assert first[f"{kind} fourth"]["names"] == ["iter_0000002", "iter_0000004"]
    assert (
        f"removing checkpoint {folder / kind / 'iter_0000003'}" in first[f"{kind} fourth"]["text"]
    )
    assert not list((folder / kind).glob(".iter_*"))
    assert_files_match_manifest(folder / kind / "iter_0000002")


def test_damaged_pickles_raise_on_all_ranks(told):
    _, ranks = told
    for name in ("common.pt", ".metadata"):
        for rank in ranks:
            assert f"{name}: damaged: " in rank[f"damaged {name}"]


def test_no_thread_is_left(told):
    _, ranks = told
    assert [rank["threads"] for rank in ranks] == [[], []]
