"""Checks of all entries of an index."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_llmjp.data import indexed_dataset
from megatron_llmjp.data.folds.datasets import inspect_datasets
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.indexed_dataset import read_and_check_index
from megatron_llmjp.data.indexed_dataset_writer import write_idx
from megatron_llmjp.errors import DataError, UserError
from tests.support.datasets import write_dataset, write_folds


def poke(prefix, kind: str, number: int, value: int) -> None:
    """Overwrite one entry of the index of a dataset."""
    index = indexed_dataset.read_index(prefix)
    base = {"lengths": 0, "pointers": 4 * index.sequences, "documents": 12 * index.sequences}[kind]
    size = 4 if kind == "lengths" else 8
    with indexed_dataset.idx_path(prefix).open("r+b") as file:
        file.seek(indexed_dataset.HEADER.size + base + size * number)
        file.write(int(value).to_bytes(size, "little", signed=True))


DAMAGE = [
    ("lengths", 20, -5, "sequence 20: length -5 is negative"),
    ("lengths", 20, 10**6, "sequence 20: 1,000,000 tokens at byte"),
    ("pointers", 20, 2**62, "sequence 20: .* are outside"),
    ("pointers", 20, -2, "sequence 20: .* are outside"),
    ("pointers", 20, 1001, "sequence 20: byte offset 1,001 is not aligned to a token"),
    ("pointers", 20, "doubled", "sequences 19 and 20 overlap"),
    ("documents", 20, 30, "document 20 begins at sequence 30 and ends before it"),
]


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(("kind", "number", "value", "message"), DAMAGE)
def test_each_kind_of_damage_is_named(kind, number, value, message, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_dataset, "CHUNK", chunk)
    write_dataset(tmp_path / "d", 50, seed=1)
    read_and_check_index(tmp_path / "d")
    if value == "doubled":
        value = int(indexed_dataset.read_index(tmp_path / "d").pointers[number - 1])
    poke(tmp_path / "d", kind, number, value)
    indexed_dataset.read_index(tmp_path / "d")  # the first and last entries are intact
    with pytest.raises(DataError, match=message):
        read_and_check_index(tmp_path / "d")


def test_any_order_and_gaps_are_allowed(tmp_path):
    """As in a fold, or in a shuffled index."""
    write_dataset(tmp_path / "d", 50, seed=1)
    whole = indexed_dataset.read_index(tmp_path / "d")
    some = np.random.default_rng(0).permutation(50)[:30]
    lengths, pointers = whole.lengths[some], whole.pointers[some]
    write_idx(tmp_path / "d.idx", whole.dtype, lengths, np.ones(30, np.int32), pointers)
    assert read_and_check_index(tmp_path / "d").documents == 30


def test_a_run_rejects_a_damaged_index(tmp_path):
    file = read_fold_file(write_folds(tmp_path))
    poke(tmp_path / "ja", "pointers", 20, 2**62)
    with pytest.raises(UserError, match=r"fold 'fold00', dataset 'ja': .*ja.idx: sequence 20"):
        inspect_datasets(file)
