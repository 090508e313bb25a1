"""Statistics of datasets, compared with counts of the text itself."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools import inspect_dataset, merge_datasets, preprocess_data, split_folds
from data_tools.statistics.counts import length_histogram
from tests.data_tools.conftest import make_documents
from tests.support.datasets import write_dataset

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "1"]
LANGUAGES = ("ja", "en", None)

Sizes = dict[tuple[str, str | None], list[int]]
"""Bytes of each text, by file and language."""


def write_corpus(folder: Path) -> Sizes:
    """Write two files with documents in two languages or none, and return the expected sizes."""
    found: Sizes = {}
    folder.mkdir()
    for number, count in enumerate((70, 110)):
        with (folder / f"{number}.jsonl").open("w", encoding="utf-8") as file:
            for at, text in enumerate(make_documents(count, seed=number)):
                language = LANGUAGES[at % 3]
                record = {"text": text} | ({"meta": {"lang": language}} if language else {})
                file.write(json.dumps(record) + "\n")
                key = (str(folder / f"{number}.jsonl"), language)
                found.setdefault(key, []).append(len(text.encode()))
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    sizes = write_corpus(folder / "in")
    common = ["--input", str(folder / "in"), *BYTES, "--language-key", "meta.lang"]
    assert preprocess_data.main([*common, "--output-prefix", str(folder / "whole" / "o")]) == 0
    for task in range(3):
        words = ["--output-prefix", str(folder / "parts" / "o"), "--shard", f"{task}/3"]
        assert preprocess_data.main([*common, *words]) == 0
    return folder, sizes, common


def summary_of(*paths: object, capsys: pytest.CaptureFixture[str]) -> tuple[list[dict], list[str]]:
    """Return the rows and warnings of inspect_dataset --summary."""
    capsys.readouterr()
    assert inspect_dataset.main(["--summary", *map(str, paths), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    return content["rows"], content["warnings"]


def expected_row(sizes: list[int]) -> dict:
    """Return the counts of texts: a token per byte, and EOD unless the text is empty."""
    lengths = [size + (size > 0) for size in sizes]
    tokens = sum(lengths)
    histogram: dict[int, int] = {}
    for length in lengths:
        histogram[length.bit_length()] = histogram.get(length.bit_length(), 0) + 1
    return {
        "documents": len(sizes),
        "tokens": tokens,
        "bytes": sum(sizes),
        "bytes_per_token": round(sum(sizes) / tokens, 4),
        "tokens_per_document": round(tokens / len(sizes), 1),
        "longest": max(sizes) + 1,
        "histogram": {
            f"{2 ** (n - 1):,}-{2**n - 1:,}" if n > 1 else str(n): histogram.get(n, 0)
            for n in range(min(histogram), max(histogram) + 1)
        },
    }


def check_rows(rows: list[dict], sizes: Sizes) -> None:
    """Compare the rows of all levels with the sizes of the texts."""
    groups: dict[tuple[str, str | None, str | None], list[int]] = {}
    for (source, language), values in sizes.items():
        language = language or ""
        keys = [("total", None, None), ("dataset", None, None), ("language", None, language)]
        keys += [("source", source, None), ("source and language", source, language)]
        for key in keys:
            groups.setdefault(key, []).extend(values)
    found = {}
    for row in rows:
        key = (row["by"], row.get("source"), row.get("language"))
        found[key] = {
            n: v for n, v in row.items() if n not in ("by", "source", "language", "dataset")
        }
    assert found == {key: expected_row(values) for key, values in groups.items()}


def test_statistics_kept_at_preprocessing(corpus, capsys):
    folder, sizes, common = corpus
    rows, warnings = summary_of(folder / "whole", capsys=capsys)
    check_rows(rows, sizes)
    assert warnings == []
    table = folder / "table.json"
    words = ["--output-prefix", str(folder / "whole" / "o"), "--report", str(table)]
    assert preprocess_data.main([*common, *words]) == 0  # complete: from the manifest
    for row, (source, values) in zip(json.loads(table.read_text()), group(sizes), strict=False):
        assert (row["source"], row["text_bytes_text"]) == (source, sum(values))
        expected = expected_row(values)["bytes_per_token"]
        assert row["bytes_per_token_text"] == pytest.approx(expected, abs=1e-4)


def group(sizes: Sizes) -> list[tuple[str, list[int]]]:
    sources: dict[str, list[int]] = {}
    for (source, _), values in sizes.items():
        sources.setdefault(source, []).extend(values)
    return sorted(sources.items())


def test_parts_count_as_one_dataset_also_after_merging(corpus, tmp_path, capsys):
    folder, sizes, _ = corpus
    rows, warnings = summary_of(folder / "parts", capsys=capsys)
    check_rows(rows, sizes)
    assert warnings == []
    assert [row["dataset"] for row in rows if row["by"] == "dataset"] == [
        str(folder / "parts" / "o_text_document")
    ]
    some = [f"{folder}/parts/o_part0000{n}of00003_text_document" for n in (0, 2)]
    _, (warning,) = summary_of(*some, capsys=capsys)
    assert "o_text_document: 1 of 3 parts are missing: 1" in warning
    assert merge_datasets.main(["--parts", str(folder / "parts" / "o")]) == 0
    rows, _ = summary_of(folder / "parts" / "o_text_document", capsys=capsys)
    check_rows(rows, sizes)


def test_an_interrupted_run_has_the_same_statistics(corpus, tmp_path, monkeypatch, capsys):
    _, sizes, common = corpus
    monkeypatch.setattr("data_tools.preprocess.job.job.SECONDS_BETWEEN_SAVES", -1.0)
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 3000)
    words = [*common, "--output-prefix", str(tmp_path / "o")]
    blocks = []

    def fail(self, *args):
        blocks.append(args)
        if len(blocks) in (4, 9):
            raise OSError(28, "No space left on device")
        return write(self, *args)

    from data_tools.preprocess.job.job import PreprocessJob

    write = PreprocessJob._write_block
    monkeypatch.setattr(PreprocessJob, "_write_block", fail)
    assert [preprocess_data.main(words) for _ in range(3)] == [2, 2, 0]
    rows, _ = summary_of(tmp_path, capsys=capsys)
    check_rows(rows, sizes)


def test_datasets_without_a_record(corpus, tmp_path, capsys):
    """As of Megatron-LM: documents and lengths from the index; bytes are unknown."""
    folder, _, _ = corpus
    write_dataset(tmp_path / "d", 90, seed=1)
    read = IndexedDataset(str(tmp_path / "d"))
    lengths = read.sequence_lengths
    rows, _ = summary_of(tmp_path / "d", capsys=capsys)
    total = rows[0]
    assert (total["documents"], total["tokens"]) == (90, int(lengths.sum()))
    assert total["bytes"] is None and total["bytes_per_token"] is None
    assert total["longest"] == lengths.max()
    assert total["histogram"] == {
        f"{2**n}-{2 ** (n + 1) - 1}": int(((lengths >= 2**n) & (lengths < 2 ** (n + 1))).sum())
        for n in range(4, 7)
    }
    # Statistics of other contents are not used.
    prefix = tmp_path / "o_text_document"
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").write_bytes((tmp_path / f"d{suffix}").read_bytes())
    manifest = json.loads((folder / "whole" / "o_text_document.json").read_text())
    for content, message in (
        (manifest, "its statistics are those of 180 documents"),
        (manifest | {"statistics": {"sources": {"x": {"": {"documents": -1}}}}}, "statistics: "),
    ):
        Path(f"{prefix}.json").write_text(json.dumps(content))
        rows, (warning,) = summary_of(prefix, capsys=capsys)
        assert message in warning and "counted from the index instead" in warning
        assert rows[0]["documents"] == 90


def test_documents_that_are_counted_twice(corpus, tmp_path, capsys):
    folder, _, _ = corpus
    whole = folder / "whole" / "o_text_document"
    words = ["--input", str(whole), "--output-dir", str(tmp_path), "--folds", "2"]
    assert split_folds.main(words) == 0
    rows, warnings = summary_of(tmp_path, capsys=capsys)
    assert rows[0]["documents"] == 180 and warnings == []
    rows, (warning,) = summary_of(tmp_path, whole, capsys=capsys)
    assert rows[0]["documents"] == 360 and "are counted more than once" in warning


def test_reports(corpus, tmp_path, capsys):
    folder, sizes, _ = corpus
    write_dataset(folder / "whole" / "d", 90, seed=1)
    names = {suffix: tmp_path / f"sizes.{suffix}" for suffix in ("csv", "json", "md", "html")}
    words = [word for path in names.values() for word in ("--report", str(path))]
    assert inspect_dataset.main(["--summary", str(folder / "whole"), *words]) == 0
    shown = capsys.readouterr().out
    assert "bytes_per_token" in shown and "█" in shown and "(unknown)" in shown
    content = json.loads(names["json"].read_text())
    rows = list(csv.DictReader(io.StringIO(names["csv"].read_text())))
    assert len(rows) == len(content["rows"]) == 1 + 2 + 3 + 3 + 7
    for text, row in zip(rows, content["rows"], strict=True):
        for name in ("by", "dataset", "source", "language", "documents", "tokens", "bytes"):
            assert text[name] == str("" if row.get(name) is None else row[name])
        bins = [int(text[name]) for name in text if name.startswith("length ")]
        assert sum(bins) == row["documents"] == sum(row["histogram"].values())
    card = DatasetCard.load(names["md"])
    assert card.data.language == ["en", "ja"]
    assert card.data.size_categories == ["n<1K"]
    total = sum(map(sum, sizes.values()))
    japanese = sum(len(values) for (_, language), values in sizes.items() if language == "ja")
    assert f"| ja | {japanese} |" in card.text and "ByteLevelTokenizer" in card.text
    assert f"| {total:,} |" in next(line for line in card.text.splitlines() if "o\\_text" in line)
    page = names["html"].read_text()
    assert page.count("data:image/svg+xml;base64,") == 6 and "<table" in page
    assert "Document lengths" in page and "Tokens: languages" in page
    assert inspect_dataset.main(["--summary", str(folder), "--report", "x.txt"]) == 2
    assert "ending in .csv, .json, .md, .html" in capsys.readouterr().err
    assert inspect_dataset.main(["--summary", str(tmp_path)]) == 2
    for words, message in (
        (["--summary", "--verify", "x"], "--verify and --summary are mutually exclusive"),
        (["--report", "x.md", "--", "x"], "--report requires --summary"),
    ):
        with pytest.raises(SystemExit):
            inspect_dataset.main(words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_languages_that_are_none(suffix, tmp_path, capsys):
    values = ["ja", None, 3, "x" * 36, "a\nb", "ja"]
    records = [{"text": f"text {i}", "lang": v} for i, v in enumerate(values)]
    path = tmp_path / f"c.{suffix}"
    if suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        column = [v if isinstance(v, str) else None for v in values]
        pq.write_table(pa.table({"text": [r["text"] for r in records], "lang": column}), path)
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    assert (
        preprocess_data.main(["--input", str(path), "--output-prefix", f"{tmp_path}/o", *BYTES])
        == 0
    )
    rows, _ = summary_of(tmp_path / "o_text_document", capsys=capsys)
    found = {row["language"]: row["documents"] for row in rows if row["by"] == "language"}
    assert found == {"ja": 2, "": 3, "(other)": 1}


def test_length_histogram():
    import numpy as np

    lengths = np.array([0, 1, 2, 3, 4, 7, 8, 2**20 - 1, 2**20, 2**31 - 1])
    expected = [0] * 40
    for length in lengths.tolist():
        expected[length.bit_length()] += 1
    found = length_histogram(lengths).tolist()
    assert found == expected[: len(found)] and sum(found) == len(lengths)
