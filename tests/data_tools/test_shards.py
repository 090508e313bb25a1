"""Sharding: the merged output of many tasks equals the output of one task."""

from __future__ import annotations

import gzip
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import merge_datasets, preprocess_data
from data_tools.preprocess.array.shards import ShardPlan
from data_tools.preprocess.encoding.encode import read_range
from data_tools.preprocess.input.blocks import FileRange, read_blocks
from data_tools.preprocess.input.sources import InputSource, find_input
from tests.data_tools.conftest import make_documents, write_jsonl

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "1"]


def test_merged_parts_equal_the_whole(tmp_path, monkeypatch, capsys):
    for at in range(5):
        write_jsonl(tmp_path / f"{at}.jsonl", make_documents(20 * at, seed=at))
    common = ["--input", str(tmp_path), *BYTES, "--json-keys", "text", "n", "--on-error", "skip"]
    for at in range(5):  # the second key: any other text
        path = tmp_path / f"{at}.jsonl"
        path.write_text(path.read_text().replace('"n": ', '"n": "n').replace("}\n", '"}\n'))
    whole, part = str(tmp_path / "whole" / "o"), str(tmp_path / "parts" / "o")
    assert preprocess_data.main([*common, "--output-prefix", whole]) == 0
    for task in (3, 0, 7, 1, 2, 4, 6):  # more tasks than files, in any order, one not yet run
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        arguments = [*common, "--output-prefix", part, "--shard", "slurm/8"]
        assert preprocess_data.main(arguments) == 0
        assert preprocess_data.main(arguments) == 0  # can be repeated
    assert merge_datasets.main(["--parts", part]) == 2
    assert "1 of 8 parts are missing for key 'n': 5." in capsys.readouterr().err
    arguments = [*common, "--output-prefix", part, "--shard", "5/8"]
    assert preprocess_data.main(arguments) == 0
    assert merge_datasets.main(["--parts", part]) == 0
    for key in ("text", "n"):
        for suffix in ("bin", "idx"):
            name = f"o_{key}_document.{suffix}"
            joined = (tmp_path / "parts" / name).read_bytes()
            assert joined == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_one_large_file_is_split_between_lines(count, tmp_path, monkeypatch):
    """Every line goes to exactly one task, also with more tasks than bytes per line."""
    monkeypatch.setattr("data_tools.preprocess.array.shards.MIN_SPLIT_BYTES", 1000)
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 700)
    large = write_jsonl(tmp_path / "b.jsonl", make_documents(60, seed=1))
    small = write_jsonl(tmp_path / "a.jsonl", make_documents(1, seed=2))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(large.read_bytes()))
    found = find_input([str(small), str(large), str(tmp_path / "c.jsonl.gz")]).sources
    whole = [line for source in found for line in lines_of(source)]
    parts = [ShardPlan(found, count).part(number) for number in range(count)]
    assert [line for part in parts for source in part for line in lines_of(source)] == whole
    if count == 7:
        assert sum(source.name == str(large) for part in parts for source in part) >= 4


def lines_of(source: InputSource) -> list[bytes]:
    """Return the lines of a source, read in blocks, and check resumption at every block."""
    blocks = list(read_blocks(source, 0, ["text"], 10**6))
    plain = [block for block in blocks if isinstance(block.payload, FileRange)]
    for before, block in itertools.pairwise(plain):
        again = next(iter(read_blocks(source, before.end, ["text"], 10**6)))
        assert (again.end, again.size) == (block.end, block.size)
    payloads = [block.payload for block in blocks]
    data = (read_range(p) if isinstance(p, FileRange) else p for p in payloads)
    return b"".join(data).splitlines()


def test_merged_split_parts_equal_the_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data_tools.preprocess.array.shards.MIN_SPLIT_BYTES", 1000)
    write_jsonl(tmp_path / "large.jsonl", make_documents(60, seed=1))
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(os.urandom(9000).hex().encode()))
    common = ["--input", str(tmp_path / "large.jsonl"), *BYTES, "--output-prefix"]
    assert preprocess_data.main([*common, str(tmp_path / "whole")]) == 0
    for task in range(3):
        arguments = [*common, str(tmp_path / "cut"), "--shard", f"{task}/3"]
        assert preprocess_data.main(arguments) == 0
        assert preprocess_data.main(arguments) == 0
    assert "Already complete" in capsys.readouterr().out
    assert merge_datasets.main(["--parts", str(tmp_path / "cut")]) == 0
    for suffix in ("bin", "idx"):
        joined = (tmp_path / f"cut_text_document.{suffix}").read_bytes()
        assert joined == (tmp_path / f"whole_text_document.{suffix}").read_bytes()
    assert (
        "z.jsonl.gz" in ShardPlan(find_input([str(tmp_path / "z.jsonl.gz")]).sources, 4).warning()
    )


@pytest.mark.parametrize("shard", ["8/8", "x/8", "3", "slurm/4"])
def test_invalid_shards(shard, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    (tmp_path / "c.jsonl").write_text("")
    arguments = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "o"), *BYTES]
    assert preprocess_data.main([*arguments, "--shard", shard]) == 2
    assert f"--shard {shard}:" in capsys.readouterr().err


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 12))
def test_every_file_goes_to_one_task_in_order(sizes, count):
    sources = [InputSource(str(at), size, seekable=True) for at, size in enumerate(sizes)]
    parts = [ShardPlan(sources, count).part(number) for number in range(count)]
    assert [source for part in parts for source in part] == sources
    largest = max(sizes, default=0)
    for part in parts:
        assert sum(source.size for source in part) <= sum(sizes) / count + largest
