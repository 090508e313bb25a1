"""Shuffled documents and removed duplicates, compared with a computation in plain Python."""

from __future__ import annotations

import errno
import gzip
import hashlib
import itertools
import json
import random
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_tools import merge_datasets, preprocess_data
from data_tools.preprocess.arrangement.arranged_output import ArrangedOutput
from data_tools.preprocess.job.journal import ResumeJournal
from data_tools.preprocess.job.output import DatasetOutput
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from tests.data_tools.conftest import make_documents, write_jsonl

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod"]
BYTES += ["--record-sources", "--id-key", "n"]
EOD = 256


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Use many blocks, runs, slices and buckets, and a clock that advances with each call."""
    clock = SimpleNamespace(monotonic=itertools.count(step=6).__next__)
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 5000)
    monkeypatch.setattr("data_tools.preprocess.job.job.time", clock)
    monkeypatch.setattr("data_tools.preprocess.arrangement.arranged_output.time", clock)
    monkeypatch.setattr("data_tools.preprocess.arrangement.arranged_output.RUN_BYTES", 30000)
    monkeypatch.setattr("data_tools.preprocess.arrangement.arrange.SLICE_BYTES", 20000)
    monkeypatch.setattr("data_tools.preprocess.arrangement.arrange.DOCUMENTS_PER_SLICE", 40)
    monkeypatch.setattr("data_tools.preprocess.arrangement.staged_dataset.RECORDS_PER_CHUNK", 50)
    monkeypatch.setattr("data_tools.preprocess.arrangement.duplicates.BUCKET_BYTES", 1000)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Three files that share documents, the second one compressed."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [make_documents(count, seed) for seed, count in enumerate((150, 90, 60))]
    texts[0][20:30] = texts[0][5:15]
    texts[0][60:72] = [text for text in texts[0][60:64] for _ in range(3)]
    texts[1][3:9] = texts[0][40:46]
    texts[2][-4:] = [*texts[1][3:5], "", ""]
    paths = [write_jsonl(folder / f"{at}.jsonl", found) for at, found in enumerate(texts)]
    paths[0].write_text(paths[0].read_text().replace('"n": 7}\n', '"n": 7}\n\n \n'))  # blank lines
    compressed = folder / "1.jsonl.gz"
    compressed.write_bytes(gzip.compress(paths[1].read_bytes()))
    return [str(paths[0]), str(compressed), str(paths[2])]


def read_lines(path: str) -> list[tuple[int, str]]:
    """Return the offset and text of each document."""
    data = gzip.decompress(Path(path).read_bytes()) if path.endswith("gz") else None
    data = Path(path).read_bytes() if data is None else data
    found, offset = [], 0
    for line in data.splitlines(keepends=True):
        if line.strip():
            found.append((offset, json.loads(line)["text"]))
        offset += len(line)
    return found


def finalize(value: int) -> int:
    """Return the output function of SplitMix64, as in its authors' reference code."""
    mask = 2**64 - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def expected_texts(inputs: list[str], seed: int | None, unique: bool) -> list[str]:
    documents = [
        ((number << 44) + offset, text)
        for number, path in enumerate(inputs)
        for offset, text in read_lines(path)
    ]
    if unique:
        first: dict[str, int] = {}
        for position, text in documents:
            first.setdefault(text, position)
        documents = [(position, text) for position, text in documents if first[text] == position]
    if seed is not None:
        one, two = struct.unpack("<2Q", hashlib.sha512(f"{seed}/documents".encode()).digest()[:16])
        documents.sort(key=lambda pair: finalize(finalize(pair[0] ^ one) ^ two))
    return [text for _, text in documents]


def read_texts(prefix: str) -> list[str]:
    """Return the documents of a dataset of bytes."""
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    data = np.where(ids == EOD, 0xFF, ids).astype(np.uint8).tobytes()
    return [text.decode() for text in data.split(b"\xff")[:-1]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("seed", "unique"), [(1, False), (7, True), (None, True)])
def test_order_and_duplicates(seed, unique, inputs, tmp_path):
    arguments = ["--input", *inputs, "--output-prefix", str(tmp_path / "o"), *BYTES]
    arguments += ["--shuffle-seed", str(seed)] if seed is not None else []
    arguments += ["--remove-duplicates"] if unique else []
    reports = ["--report", str(tmp_path / "r.json"), "--workers", "2"]
    assert preprocess_data.main([*arguments, *reports]) == 0
    expected = expected_texts(inputs, seed, unique)
    assert read_texts(str(tmp_path / "o_text_document")) == [text for text in expected if text]
    manifest = json.loads((tmp_path / "o_text_document.json").read_text())
    assert manifest["documents"] == len(expected)
    assert manifest["tokens"] == sum(len(text.encode()) + bool(text) for text in expected)
    rows = json.loads((tmp_path / "r.json").read_text())
    assert rows[-1]["documents"] == len(expected) and rows[-1]["tokens_text"] == manifest["tokens"]
    assert rows[-1]["text_bytes_text"] == sum(len(text.encode()) for text in expected)
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".order", ".partial")] == []
    if unique:
        kept = dict.fromkeys(inputs, 0)
        seen: set[str] = set()
        for path in inputs:
            texts = [text for _, text in read_lines(path)]
            kept[path] = len({*texts} - seen)
            seen |= {*texts}
        assert [row["documents"] for row in rows[:-1]] == [*kept.values()]
        lost = [len(read_lines(path)) - kept[path] for path in inputs]
        assert [row["duplicates"] for row in rows[:-1]] == lost
        removed = manifest["statistics"]["removed"]
        assert [removed[path]["duplicates"] for path in inputs] == lost


def test_lines_above_the_limit_are_skipped(tmp_path):
    path = tmp_path / "in.jsonl"
    long = json.dumps({"text": "x" * 1_000_000})
    path.write_text(f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n{{"text": "a"}}\n')
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "o"), *BYTES]
    arguments += ["--remove-duplicates", "--on-error", "skip", "--max-rejected", "50%"]
    assert preprocess_data.main([*arguments, "--max-line-mb", "1", "--workers", "1"]) == 0
    assert read_texts(str(tmp_path / "o_text_document")) == ["a", "b"]


class Killed(BaseException):
    """Simulates kill -9: no code may run after it."""


ERRORS = (Killed, KeyboardInterrupt, lambda: OSError(errno.ENOSPC, "No space left on device"))
"""After the others, the program saves what it has written."""


def test_interruptions_at_all_stages(inputs, tmp_path, monkeypatch, capsys):
    """Fail in the n-th call of one of these functions, repeatedly: the same bytes at the end."""
    options = [*BYTES, "--shuffle-seed", "3", "--remove-duplicates", "--shard", "0/1"]
    common = ["--input", *inputs, *options]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert preprocess_data.main([*common, "--workers", "2", "--output-prefix", f"{whole}/o"]) == 0
    command = [*common, "--workers", "1", "--output-prefix", f"{cut}/o"]
    draw = random.Random(8)
    functions = [(IndexedDatasetWriter, "add", 9), (ResumeJournal, "add", 6), (Path, "replace", 5)]
    functions += [(IndexedDatasetWriter, "finish", 2), (IndexedDatasetWriter, "sync", 5)]
    functions += [(DatasetOutput, "resume_point", 40), (ArrangedOutput, "add", 40)]
    deaths = 0
    for attempt in range(3 * len(functions)):
        owner, name, calls = functions[attempt % len(functions)]
        original, left = getattr(owner, name), [draw.randint(1, calls)]

        error = ERRORS[attempt // len(functions)]

        def dying(self, *args, _original=original, _left=left, _error=error, **kwargs):
            _left[0] -= 1
            if _left[0] == 0 and draw.random() < 0.5:
                raise _error()
            result = _original(self, *args, **kwargs)
            if _left[0] == 0:
                raise _error()
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            try:
                code = preprocess_data.main(command)
            except Killed:
                code = 130
        if code != 0:
            assert code in (2, 130)
            deaths += 1
            continue
        assert files(cut) == files(whole)
        shutil.rmtree(cut)
    assert deaths > 10
    assert preprocess_data.main(command) == 0
    assert files(cut) == files(whole)


def test_a_block_after_the_resume_point_is_not_saved(inputs, tmp_path, monkeypatch, capsys):
    """Ctrl-C between the count of a block and the point after it: the block is encoded again."""
    common = ["--input", *inputs, *BYTES, "--shuffle-seed", "3", "--workers", "1"]
    assert preprocess_data.main([*common, "--output-prefix", str(tmp_path / "whole" / "o")]) == 0
    command = [*common, "--output-prefix", str(tmp_path / "cut" / "o")]
    original, calls = ArrangedOutput.resume_point, itertools.count(1)

    def interrupted(self, *args):
        point = original(self, *args)
        if next(calls) == 20:
            raise KeyboardInterrupt
        return point

    with monkeypatch.context() as patch:
        patch.setattr(ArrangedOutput, "resume_point", interrupted)
        assert preprocess_data.main(command) == 130
    assert preprocess_data.main(command) == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_more_input_after_an_interruption_in_the_last_step(inputs, tmp_path, monkeypatch, capsys):
    """Documents that were already arranged are arranged again with those of the new file."""
    common = [*BYTES, "--shuffle-seed", "3", "--remove-duplicates", "--workers", "1"]
    whole = ["--input", *inputs, *common, "--output-prefix", str(tmp_path / "whole" / "o")]
    assert preprocess_data.main(whole) == 0
    command = [*common, "--output-prefix", str(tmp_path / "cut" / "o"), "--input", *inputs[:2]]
    with monkeypatch.context() as patch:
        patch.setattr(DatasetOutput, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess_data.main(command)
    assert preprocess_data.main([*command, inputs[2]]) == 0
    assert "240 documents are done, 2 of 3 files" in capsys.readouterr().err
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_merged_parts_equal_the_whole(inputs, tmp_path, monkeypatch, capsys):
    """Tasks with parts of files, hooks and limits: the dataset of one task, and its counts."""
    monkeypatch.setattr("data_tools.preprocess.array.shards.MIN_SPLIT_BYTES", 1000)
    hooks = tmp_path / "hooks.py"
    hooks.write_text(
        "def keep(document):\n    return document['n'] % 5 != 0\n\n"
        "def transform(document):\n"
        "    return {'title': document['text'][:3], 'text': document['text'][3:]}\n"
    )
    options = [*BYTES, "--hooks", str(hooks), "--min-characters", "20", "--max-tokens", "400"]
    options += ["--shuffle-seed", "3", "--remove-duplicates", "--json-keys", "title", "text"]
    common = ["--input", *inputs, *options, "--workers", "1", "--output-prefix"]
    reports = [tmp_path / f"{name}.csv" for name in ("whole", "auto")]
    whole_job = [*common, str(tmp_path / "whole"), "--report", str(reports[0])]
    assert preprocess_data.main(whole_job) == 0
    last = [*common, str(tmp_path / "auto"), "--shard", "2/4", "--finish-array"]
    assert preprocess_data.main([*last, "--report", str(reports[1])]) == 0
    assert reports[0].read_text() == reports[1].read_text()
    for task in range(4):
        shard = ["--shard", f"{task}/4"]
        assert preprocess_data.main([*common, str(tmp_path / "cut"), *shard]) == 0
    assert merge_datasets.main(["--parts", str(tmp_path / "cut")]) == 0
    for key, suffix in itertools.product(("title", "text"), ("bin", "idx", "sources")):
        whole = (tmp_path / f"whole_{key}_document.{suffix}").read_bytes()
        for name in ("cut", "auto"):
            assert (tmp_path / f"{name}_{key}_document.{suffix}").read_bytes() == whole, name
    merged, automatic, whole = (
        json.loads((tmp_path / f"{name}_text_document.json").read_text())["statistics"]
        for name in ("cut", "auto", "whole")
    )
    assert merged == automatic == whole
    totals = {
        reason: sum(removed[reason] for removed in whole["removed"].values())
        for reason in ("filtered", "too_short", "too_long", "duplicates")
    }
    assert min(totals.values()) > 0
    other = ["--shard", "2/4", "--overwrite", "--shuffle-seed", "4"]
    assert preprocess_data.main([*common, str(tmp_path / "cut"), *other]) == 0
    assert merge_datasets.main(["--parts", str(tmp_path / "cut"), "--overwrite"]) == 2
    assert "--shuffle-seed 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "other"),
    [
        ("--shuffle-seed", "1", "2"),
        ("--max-characters", "300", "301"),
        ("--hooks", "def keep(document):\n    return True\n", "def keep(d):\n    return True\n"),
    ],
)
def test_resuming_with_other_options_raises(option, value, other, inputs, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    hooks = tmp_path / "hooks.py"
    common = ["--input", inputs[0], str(broken), *BYTES, "--workers", "1"]
    common += ["--output-prefix", str(tmp_path / "o"), option]

    def run(chosen: str) -> int:
        hooks.write_text(chosen)
        return preprocess_data.main([*common, str(hooks) if option == "--hooks" else chosen])

    assert run(value) == 2
    assert f"{broken}:2: not valid JSON" in capsys.readouterr().err
    assert run(other) == 2
    err = capsys.readouterr().err
    assert "unfinished run with another options" in err
    assert option.strip("-").replace("-", "_") in err
    broken.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert run(value) == 0
