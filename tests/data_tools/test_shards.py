"""Many tasks over one list of files make what one task makes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import merge_datasets, preprocess_data
from data_tools.shards import take_shard
from data_tools.sources import Source
from tests.data_tools.conftest import make_documents, write_jsonl

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "1"]


def test_parts_joined_are_the_whole(tmp_path, monkeypatch, capsys):
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
        assert preprocess_data.main(arguments) == 0  # safe to run again
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


@pytest.mark.parametrize("shard", ["8/8", "x/8", "3", "slurm/4"])
def test_mistakes(shard, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    (tmp_path / "c.jsonl").write_text("")
    arguments = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "o"), *BYTES]
    assert preprocess_data.main([*arguments, "--shard", shard]) == 2
    assert f"--shard {shard}:" in capsys.readouterr().err


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 12))
def test_every_file_goes_to_one_task_in_order(sizes, count):
    sources = [Source(str(at), size, seekable=True) for at, size in enumerate(sizes)]
    parts = [take_shard(sources, number, count)[0] for number in range(count)]
    assert [source for part in parts for source in part] == sources
    largest = max(sizes, default=0)
    for part in parts:
        assert sum(source.size for source in part) <= sum(sizes) / count + largest
