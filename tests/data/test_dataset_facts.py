"""Cache of dataset facts: correct, or not used."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_llmjp.data.dataset_tokenizers import check_largest_ids
from megatron_llmjp.data.folds import datasets as fold_datasets
from megatron_llmjp.data.folds.datasets import inspect_datasets
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.errors import UserError
from tests.support.datasets import write_dataset, write_folds


def test_datasets_are_not_read_again_until_they_change(tmp_path, monkeypatch):
    file, cache = read_fold_file(write_folds(tmp_path)), tmp_path / "cache"
    fresh = inspect_datasets(file, cache)
    assert not cache.exists()  # inspecting datasets writes nothing
    fold_datasets.save_facts(fresh, cache)
    for path, info in fresh.items():
        theirs = IndexedDataset(path)  # of megatron-core
        tokens = int(theirs.sequence_lengths.sum())
        largest = int(np.fromfile(f"{path}.bin", np.uint16).max())
        assert (info.tokens, info.largest_id) == (tokens, largest)
        stored = json.loads((cache / "facts" / f"{info.stamp}.json").read_text())
        assert stored == {
            "key": info.key, "earlier_key": "", "checksums": "", "parts": [],
            "block_tokens": [tokens], "largest_id": largest, "checked": True,
        }  # fmt: skip
    read: list[str] = []
    key_of = fold_datasets.compute_keys
    monkeypatch.setattr(
        fold_datasets, "compute_keys", lambda path: (read.append(path), key_of(path))[1]
    )
    assert inspect_datasets(file, cache) == fresh
    assert read == []

    ja = str(tmp_path / "ja")
    tokens = tmp_path / "ja.bin"
    before = tokens.stat()
    with tokens.open("r+b") as stream:  # in place: the same size and modification time
        stream.write(b"\1\0")
    os.utime(tokens, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (tokens.stat().st_size, tokens.stat().st_mtime_ns) == (
        before.st_size,
        before.st_mtime_ns,
    )
    changed = inspect_datasets(file, cache)
    assert read == [ja]
    assert changed[ja].key != fresh[ja].key
    write_dataset(tmp_path / "ja", 400, seed=1)  # restored
    assert inspect_datasets(file, cache) == fresh


@pytest.mark.parametrize("text", ["", "{", '{"key": "a"}', "[]"])
def test_damaged_facts_are_computed_again(tmp_path, text):
    file, cache = read_fold_file(write_folds(tmp_path)), tmp_path / "cache"
    fresh = inspect_datasets(file)
    fold_datasets.save_facts(fresh, cache)
    for path in cache.rglob("*.json"):
        path.write_text(text)
    assert inspect_datasets(file, cache) == fresh
    fold_datasets.save_facts(fresh, cache)
    assert all(fold_datasets.load_facts(info.stamp, (), cache) == info for info in fresh.values())


def test_the_largest_id_is_below_the_vocabulary_size(tmp_path):
    (path, info), *_ = inspect_datasets(read_fold_file(write_folds(tmp_path))).items()
    tokens = {"tokenizer_type": "NullTokenizer"}
    check_largest_ids({path: replace(info, largest_id=99)}, 100, tokens)
    found = {path: replace(info, largest_id=100), "other": replace(info, largest_id=99)}
    with pytest.raises(UserError, match=rf"largest id is 99 with .*: {path} \(id 100\)\n"):
        check_largest_ids(found, 100, tokens)
