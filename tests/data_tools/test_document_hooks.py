"""Functions of --hooks, limits on length, and the counts of removed documents."""

from __future__ import annotations

import csv
import json
import random

import pytest

from data_tools import inspect_dataset, preprocess_data
from data_tools.preprocess.encoding.sample import first_texts
from data_tools.preprocess.input.sources import find_input
from data_tools.preprocess.selection.document_hooks import load_hooks
from tests.data_tools.test_arranged_documents import BYTES, read_texts


def run(tmp_path, documents, hooks=None, *options):
    """Preprocess documents; return the exit code and the prefix."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "o"), *BYTES]
    if hooks is not None:
        (tmp_path / "hooks.py").write_text(hooks)
        arguments += ["--hooks", str(tmp_path / "hooks.py")]
    code = preprocess_data.main([*arguments, "--workers", "1", *options])
    return code, str(tmp_path / "o_text_document")


def test_keep_is_called_before_transform(tmp_path):
    hooks = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Limits:
    score: float = 0.5

def keep(document):
    return document["score"] > Limits().score

def transform(document):
    assert document["score"] > 0.5
    return {"text": document["title"] + ": " + document["body"]}
"""
    documents = [
        {"title": "a", "body": "one", "score": 0.9},
        {"title": "b", "body": "two", "score": 0.1},
        {"title": "c", "body": "three", "score": 0.7},
    ]
    code, prefix = run(tmp_path, documents, hooks)
    assert code == 0
    assert read_texts(prefix) == ["a: one", "c: three"]


def test_hooks_receive_all_columns_of_a_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pyarrow.table({"title": ["a", "b"], "body": ["one", "two"], "stars": [[1], [2, 3]]})
    pq.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "hooks.py").write_text(
        "def transform(document):\n"
        "    return {'text': document['body'] + str(sum(document['stars']))}\n"
    )
    arguments = ["--input", str(tmp_path / "in.parquet"), "--output-prefix", str(tmp_path / "o")]
    arguments += [*BYTES, "--workers", "1", "--hooks", str(tmp_path / "hooks.py")]
    assert preprocess_data.main(arguments) == 0
    assert read_texts(str(tmp_path / "o_text_document")) == ["one1", "two5"]


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ("def keep(document):\n    x = 1\n    return x / document['n'] > 0\n", "hooks.py:3: Zero"),
        ("def keep(document):\n    pass\n", "hooks.py:1: keep() returned NoneType"),
        ("\ndef transform(document):\n    return 'a'\n", "hooks.py:2: transform() returned str"),
        ("def keep(document):\n    return helper(document)\n\n\n"
         "def helper(document):\n    return int('x')\n", "hooks.py:6: ValueError"),
        ("import sys\ndef keep(document):\n    sys.exit(3)\n", "hooks.py:3: SystemExit: 3"),
    ],
)  # fmt: skip
def test_errors_name_the_line_of_the_hook_and_of_the_input(hooks, message, tmp_path, capsys):
    hooks = hooks.replace("return 'a'", "return document if document['n'] else 'a'")
    hooks = hooks.replace("    pass\n", "    if document['n']:\n        return True\n")
    hooks = hooks.replace("sys.exit(3)", "return True if document['n'] else sys.exit(3)")
    hooks = hooks.replace("int('x')", "document['n'] or int('x')").replace(
        "return document['n'] or", "return bool(document['n']) or"
    )
    code, _ = run(tmp_path, [{"text": "a", "n": 2}, {"text": "b", "n": 0}], hooks)
    assert code == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}/in.jsonl:2: error in --hooks ({tmp_path}/{message}" in err
    assert "Traceback" not in err


def test_tokenizers_are_compared_on_transformed_texts(tmp_path):
    """The sample for --fast-encoder is what is encoded, also of the rows of a table."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "hooks.py"
    path.write_text(
        "def keep(document):\n    return document['n'] > 0\n\n"
        "def transform(document):\n    return {'text': document['body'] + '!'}\n"
    )
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"body": "a", "n": 1}\n{"body": "b", "n": 0}\n{"n": 1}\n')
    pq.write_table(pyarrow.table({"body": ["c", "d"], "n": [0, 1]}), tmp_path / "t.parquet")
    sources = find_input([str(lines), str(tmp_path / "t.parquet")]).sources
    assert first_texts(sources, ["text"], 1000, load_hooks(str(path))) == ["a!", "d!"]


def test_skipped_errors_are_counted_as_rejected(tmp_path, capsys):
    hooks = "def keep(document):\n    return bool(1 / document['n'])\n"
    documents = [{"text": "a", "n": 1}, {"text": "b", "n": 0}]
    options = ["--on-error", "quarantine", "--max-rejected", "60%"]
    code, prefix = run(tmp_path, documents, hooks, *options)
    assert code == 0 and read_texts(prefix) == ["a"]
    assert json.loads((tmp_path / "o_rejected.jsonl").read_text()) == documents[1]
    with (tmp_path / "o_rejected.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["reason"] == "error in --hooks" and "hooks.py:2: ZeroDivisionError" in row["detail"]


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ("x = 1\n", "defines neither keep(document) -> bool nor transform"),
        ("keep = 3\n", "keep is int, expected a function"),
        ("def keep():\n    return True\n", "keep() must accept one argument"),
        ("\ndef keep(document)\n", "hooks.py:2: SyntaxError"),
        ("import nothing_of_this_name\n", "hooks.py:1: ModuleNotFoundError"),
        (None, "hooks.py: no such file"),
    ],
)
def test_invalid_hooks_are_refused_before_the_run(hooks, message, tmp_path, capsys):
    options = [] if hooks is not None else ["--hooks", str(tmp_path / "hooks.py")]
    code, _ = run(tmp_path, [{"text": "a"}], hooks, *options)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.partial").exists()


def test_limits_count_characters_and_tokens(tmp_path, capsys):
    """Characters are code points of all texts; tokens are bytes here, and EOD."""
    texts = ["あ" * 4, "a" * 4, "あ" * 5, "a" * 9, ["aaa", "aa"], "a" * 11, ""]
    options = ["--min-characters", "5", "--max-characters", "10", "--max-tokens", "10"]
    code, prefix = run(tmp_path, [{"text": text} for text in texts], None, *options)
    assert code == 0
    assert read_texts(prefix) == ["a" * 9, "aaaaa"]
    statistics = json.loads((tmp_path / "o_text_document.json").read_text())["statistics"]
    assert statistics["removed"] == {str(tmp_path / "in.jsonl"): {"too_short": 3, "too_long": 2}}
    out = capsys.readouterr().out
    assert out.split("\n")[0].split()[-2:] == ["too_short", "too_long"]
    tokens = ["--min-tokens", "6", "--max-tokens", "9", "--overwrite"]
    code, prefix = run(tmp_path, [{"text": text} for text in texts], None, *tokens)
    assert code == 0 and read_texts(prefix) == ["aaaaa"]


def test_minimum_above_maximum_raises(tmp_path, capsys):
    code, _ = run(tmp_path, [{"text": "a"}], None, "--min-tokens", "9", "--max-tokens", "8")
    assert code == 2
    assert "--min-tokens 9 is larger than --max-tokens 8" in capsys.readouterr().err


def test_statistics_are_those_of_the_documents_kept(tmp_path):
    """Counts by language, which are not those of the documents that were read."""
    draw = random.Random(1)
    documents = [
        {"text": f"t{draw.randint(0, 30)}" * draw.randint(1, 4), "lang": draw.choice(["ja", "en"])}
        for _ in range(300)
    ]
    code, _ = run(tmp_path, documents, None, "--remove-duplicates", "--shuffle-seed", "2")
    assert code == 0
    kept: dict[str, str] = {}
    for document in documents:
        kept.setdefault(document["text"], document["lang"])
    assert len(kept) < 150
    manifest = json.loads((tmp_path / "o_text_document.json").read_text())
    found = manifest["statistics"]["sources"][str(tmp_path / "in.jsonl")]
    for language in ("ja", "en"):
        sizes = [len(text) for text, of_text in kept.items() if of_text == language]
        counts = found[language]
        assert (counts["documents"], counts["bytes"]) == (len(sizes), sum(sizes))
        assert (counts["tokens"], counts["longest"]) == (sum(sizes) + len(sizes), max(sizes) + 1)


def test_summary_reports_removed_documents(tmp_path, capsys):
    texts = ["aaa", "a", "aaa", "bbbb"]
    options = ["--min-characters", "2", "--remove-duplicates"]
    code, prefix = run(tmp_path, [{"text": text} for text in texts], None, *options)
    assert code == 0 and read_texts(prefix) == ["aaa", "bbbb"]
    capsys.readouterr()
    reports = [tmp_path / f"r{suffix}" for suffix in (".csv", ".json", ".md", ".html")]
    flags = [word for path in reports for word in ("--report", str(path))]
    assert inspect_dataset.main(["--summary", prefix, *flags]) == 0
    assert "documents removed at preprocessing" in capsys.readouterr().out
    with reports[0].open(newline="") as file:
        total = next(iter(csv.DictReader(file)))
    assert (total["documents"], total["removed too_short"], total["removed duplicates"]) == (
        "2",
        "1",
        "1",
    )
    (dataset,) = json.loads(reports[1].read_text())["datasets"]
    assert dataset["removed"] == {str(tmp_path / "in.jsonl"): {"too_short": 1, "duplicates": 1}}
    for path in reports[2:]:
        assert "removed at preprocessing" in path.read_text()
