"""Recorded sources of documents, compared with the lines of the input files."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import inspect_dataset, merge_datasets, preprocess_data, split_folds
from data_tools.document_sources import sources_file
from data_tools.document_sources.columns import DocumentSources
from data_tools.document_sources.sources_file import SourcesFile, SourcesFileWriter
from tests.data_tools.conftest import make_documents
from tests.data_tools.test_companions import documents_of

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod"]
RECORD = ["--record-sources", "--id-key", "meta.id"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 5000)
    monkeypatch.setattr("data_tools.preprocess.array.shards.MIN_SPLIT_BYTES", 1000)
    monkeypatch.setattr("data_tools.preprocess.arrangement.arrange.SLICE_BYTES", 20000)
    monkeypatch.setattr("data_tools.preprocess.arrangement.arranged_output.RUN_BYTES", 30000)


def make_lines(count: int, seed: int) -> list[bytes]:
    """Return JSON lines with ids of several types, blank lines, and a bad line."""
    lines = []
    for at, text in enumerate(make_documents(count, seed)):
        own = {"id": random.Random(f"{seed}/{at}").choice([f"文書-{seed}-{at}", at, None])}
        record = {"text": text, "title": text[:5], "meta": own}
        lines.append(json.dumps(record, ensure_ascii=at % 2 == 0).encode())
    lines[7:7] = [b"", b"  "]
    lines[20:20] = [b"broken", lines[3]]  # a copy of an earlier line
    return lines


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[Path]:
    """Plain, gzip of several streams, zstd, and Parquet of several row groups."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [b"\n".join(make_lines(90, seed)) for seed in range(3)]
    plain, several, one = (folder / name for name in ("0.jsonl", "1.jsonl.gz", "2.jsonl.zst"))
    plain.write_bytes(texts[0])
    pieces = [texts[1][at : at + 4000] for at in range(0, len(texts[1]), 4000)]
    several.write_bytes(b"".join(map(gzip.compress, pieces)))
    one.write_bytes(zstandard.compress(texts[2]))
    records = [json.loads(line) for line in make_lines(70, 9) if line[:1] == b"{"]
    for record in records:
        record["meta"]["id"] = str(record["meta"]["id"])
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, folder / "3.parquet", row_group_size=15)
    return [plain, several, one, folder / "3.parquet"]


def read_records(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the JSON object of each line by line number and byte offset, read with libraries."""
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return {(number, -1): row for number, row in enumerate(rows)}
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    data = zstandard.ZstdDecompressor().decompress(data) if path.suffix == ".zst" else data
    found, offset = {}, 0
    for number, line in enumerate(data.split(b"\n")):
        if line.startswith(b"{"):
            found[number, offset] = json.loads(line)
        offset += len(line) + 1
    return found


def assert_sources(prefix: Path, key: str = "text") -> list[tuple[str, int]]:
    """Compare each document with the line that its source names; return files and lines."""
    reader = SourcesFile(Path(f"{prefix}.sources"))
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    declared, data = manifest["document_sources"], reader.path.read_bytes()
    assert declared["bytes"] == len(data) and declared["crc32"] == f"{zlib.crc32(data):08x}"
    found = reader.read(0, reader.documents)
    documents = documents_of(prefix)
    assert len(found) == manifest["documents"] == len(documents)
    assert declared["with_id"] == int((found.id_lengths > 0).sum())
    names = [Path(str(file["name"])) for file in reader.files]
    records = {name: read_records(name) for name in names}
    places = zip(found.file, found.line, found.offset, found.id_list(), documents, strict=True)
    for file, line, offset, own, ids in places:
        record = records[names[file]][line, offset]
        assert bytes(ids[:-1]).decode() == record[key]
        assert own == ("" if record["meta"]["id"] is None else str(record["meta"]["id"]))
    return [(str(names[f]), int(n)) for f, n in zip(found.file, found.line, strict=True)]


ORDERS = {
    "input": [],
    "shuffled": ["--shuffle-seed", "5"],
    "unique": ["--remove-duplicates"],
    "both": ["--shuffle-seed", "5", "--remove-duplicates", "--min-characters", "20"],
}


@pytest.mark.parametrize("order", ORDERS)
def test_each_document_is_the_line_of_its_source(order, inputs, tmp_path):
    """For a job and for an array, whose parts are of files that were cut: equal bytes."""
    words = ["--input", *map(str, inputs), *BYTES, *RECORD, *ORDERS[order], "--on-error", "skip"]
    words += ["--max-rejected", "5%", "--json-keys", "text", "title"]
    whole = [*words, "--output-prefix", str(tmp_path / "o")]
    assert preprocess_data.main([*whole, "--workers", "2"]) == 0
    places = assert_sources(tmp_path / "o_text_document")
    assert assert_sources(tmp_path / "o_title_document", "title") == places
    in_order = sorted(places)
    assert len(set(places)) == len(places)
    assert (places == in_order) == ("--shuffle-seed" not in ORDERS[order])
    lines = [(str(path), line) for path in inputs for line, _ in read_records(path)]
    assert set(places) <= set(lines)
    if order in ("input", "shuffled"):
        assert len(lines) - len(places) == 1  # an empty text
    array = [*words, "--output-prefix", str(tmp_path / "a"), "--shard", "0/3", "--workers", "1"]
    assert preprocess_data.main([*array, "--finish-array"]) == 0
    merged = SourcesFile(tmp_path / "a_text_document.sources")
    parts = [
        json.loads((tmp_path / f"a_part0000{at}of00003_text_document.json").read_text())
        for at in range(3)
    ]
    cut = [file for part in parts for file in part["recipe"]["sources"] if "bytes" in file]
    assert cut
    if ORDERS[order]:
        assert sorted(assert_sources(tmp_path / "a_text_document")) == in_order
    for key in ("text", "title"):
        of_array = (tmp_path / f"a_{key}_document.sources").read_bytes()
        assert of_array == (tmp_path / f"o_{key}_document.sources").read_bytes()
    assert len(merged.files) == len(inputs)
    assert inspect_dataset.main(["--verify", str(tmp_path / "a_text_document")]) == 0


def test_merged_and_divided_datasets(inputs, tmp_path, capsys):
    """A part without sources is named by dataset and number; folds keep those of their lines."""
    words = [*BYTES, "--on-error", "skip", "--max-rejected", "5%", "--workers", "1"]
    for name, path in zip("abc", inputs[:3], strict=True):
        made = ["--input", str(path), "--output-prefix", str(tmp_path / name), *words]
        made += [] if name == "b" else RECORD
        assert preprocess_data.main(made) == 0
    parts = [str(tmp_path / f"{name}_text_document") for name in "abc"]
    merged = tmp_path / "merged"
    assert merge_datasets.main(["--input", *parts, "--output-prefix", str(merged)]) == 0
    found = SourcesFile(Path(f"{merged}.sources"))
    assert [file.get("name") for file in found.files] == [str(inputs[0]), None, str(inputs[2])]
    assert found.files[1] == {"dataset": parts[1]}
    every = found.read(0, found.documents)
    counts = [len(documents_of(prefix)) for prefix in parts]
    assert every.file.tolist() == [0] * counts[0] + [1] * counts[1] + [2] * counts[2]
    assert every.line[every.file == 1].tolist() == list(range(counts[1]))
    for at, name in ((0, "a"), (2, "c")):
        own = SourcesFile(Path(f"{tmp_path}/{name}_text_document.sources")).read(0, counts[at])
        assert every.line[every.file == at].tolist() == own.line.tolist()
        assert every.offset[every.file == at].tolist() == own.offset.tolist()
    split = ["--input", parts[0], "--output-dir", str(tmp_path / "folds"), "--folds", "3"]
    assert split_folds.main([*split, "--validation-documents", "5"]) == 0
    folds = list((tmp_path / "folds").iterdir())
    assert len(folds) == 4
    places = [place for fold in folds for place in assert_sources(fold / "a_text_document")]
    assert sorted(places) == sorted(assert_sources(Path(parts[0])))
    # A dataset that is replaced by one without sources keeps none.
    again = ["--input", str(inputs[0]), "--output-prefix", str(tmp_path / "a"), *words]
    assert preprocess_data.main([*again, "--overwrite"]) == 0
    assert not Path(f"{parts[0]}.sources").exists()
    assert (
        merge_datasets.main(["--input", parts[0], "--output-prefix", str(merged), "--overwrite"])
        == 0
    )
    assert not Path(f"{merged}.sources").exists()
    assert preprocess_data.main([*again, "--id-key", "n"]) == 2
    assert "--id-key n requires --record-sources" in capsys.readouterr().err


def test_a_damaged_file_is_found(inputs, tmp_path, capsys):
    words = ["--input", str(inputs[2]), "--output-prefix", str(tmp_path / "o"), *BYTES, *RECORD]
    assert preprocess_data.main([*words, "--on-error", "skip", "--max-rejected", "5%"]) == 0
    prefix = tmp_path / "o_text_document"
    path = Path(f"{prefix}.sources")
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[100] ^= 1
    for damaged, message in (
        (bytes(flipped), "its contents have changed since it was written"),
        (data[:-1], "not a file of document sources, or truncated"),
        (None, "is missing"),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert inspect_dataset.main(["--verify", str(prefix)]) == 1
        assert message in capsys.readouterr().out


COLUMN = st.lists(st.integers(0, 2**62) | st.integers(0, 300), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None)
@given(offsets=COLUMN, ids=st.lists(st.text(max_size=4), min_size=40, max_size=40))
def test_any_values_are_read_as_written(offsets, ids, tmp_path_factory):
    """In blocks of 16 documents, in parts of any size, and in any range."""
    path = tmp_path_factory.mktemp("values") / "x.sources"
    count = len(offsets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_file, "BLOCK_DOCUMENTS", 16)
        writer = SourcesFileWriter(path)
        starts = np.array(offsets, np.int64)
        of_all = DocumentSources.of_lines(range(count), starts, ids[:count])
        for first in range(0, count, 7):
            writer.add(of_all.slice(first, min(first + 7, count)))
        writer.finish([{"name": "a"}])
        reader = SourcesFile(path)
        for first, end in itertools.combinations(range(0, count + 1, 5), 2):
            found = reader.read(first, end)
            assert found.offset.tolist() == offsets[first:end]
            assert found.line.tolist() == list(range(first, end))
            assert found.id_list() == ids[first:end]
