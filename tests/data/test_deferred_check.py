"""The check of large datasets' indices in the background."""

from __future__ import annotations

import json

import pytest

from megatron_llmjp.data.folds import datasets as fold_datasets
from megatron_llmjp.data.folds.datasets import check_datasets, inspect_datasets, save_facts
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.indices.deferred_check import DeferredCheck
from megatron_llmjp.data.indices.prefetch import IndexPrefetcher
from megatron_llmjp.errors import DataError
from tests.data.test_epoch_index import BATCH, folds_of
from tests.data.test_index_check import poke
from tests.support.datasets import write_folds
from tests.support.timeouts import wait_until


@pytest.fixture
def facts(tmp_path, monkeypatch):
    """Facts about datasets of which one is damaged, computed without a check of every entry."""
    monkeypatch.setattr(fold_datasets, "MAX_CHECKED_SEQUENCES", 0)
    file = read_fold_file(write_folds(tmp_path))
    poke(tmp_path / "ja", "pointers", 20, 2**62)
    found = inspect_datasets(file)
    assert not any(info.checked for info in found.values())
    return found


def finish(check: DeferredCheck) -> None:
    """Wait for a check that finds nothing."""
    wait_until(lambda: check.poll() or check._child is None)


def test_damage_ends_the_run(facts, tmp_path):
    """At the next step after it was found; the datasets that were checked are recorded."""
    check = DeferredCheck(facts, tmp_path / "cache")
    data = folds_of(tmp_path)  # writes the datasets again
    poke(tmp_path / "ja", "pointers", 20, 2**62)
    prefetcher = IndexPrefetcher(data, first_on_machine=True, log=lambda _: None, check=check)
    prefetcher.start(0, BATCH, [])
    with pytest.raises(DataError, match=r"ja.idx: sequence 20: .* are outside"):
        wait_until(lambda: not prefetcher.ensure_ready(0, BATCH))
    prefetcher.close()


def test_what_was_checked_is_recorded(facts, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    save_facts(facts, cache)
    intact = {path: info for path, info in facts.items() if not path.endswith("ja")}
    check = DeferredCheck(intact, cache)
    check.start()
    finish(check)
    file = read_fold_file(tmp_path / "folds.yaml")
    again = inspect_datasets(file, cache)
    assert {path: info.checked for path, info in again.items()} == {
        path: path in intact for path in facts
    }
    with pytest.raises(DataError, match="sequence 20"):
        check_datasets(again, cache)
    # Nothing is checked twice, and facts without a check do not replace others.
    idle = DeferredCheck(intact | {p: i for p, i in again.items() if i.checked}, cache)
    assert not idle._datasets
    save_facts(facts, cache)
    stored = [json.loads(path.read_text())["checked"] for path in cache.rglob("*.json")]
    assert sorted(stored) == [False, True, True]


def test_it_ends_with_the_run(facts, tmp_path):
    check = DeferredCheck(facts, tmp_path / "cache")
    check.poll()  # not started
    check.start()
    child = check._child
    check.close()
    assert child is not None and child.poll() is not None
    check.close()
