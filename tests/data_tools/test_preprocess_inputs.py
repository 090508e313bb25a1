"""Input formats of preprocess_data: all give the same dataset, in input order."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_tools.preprocess.input.sources import find_input
from data_tools.preprocess_data import main
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.errors import UserError

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "2"]


def tokens_of(prefix: Path) -> bytes:
    """Return the documents of a byte-level dataset, each ended by a 0xff byte."""
    tokens = read_index(f"{prefix}_text_document").read_tokens()
    return bytes(255 if token == 256 else int(token) for token in tokens)


def expected(documents: list[str]) -> bytes:
    return b"".join(text.encode() + b"\xff" for text in documents)


def two_zstd_frames(data: bytes) -> bytes:
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


def two_gzip_members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


def as_pzstd(data: bytes) -> bytes:
    """Compress as pzstd does: a skippable frame with a size before each frame."""
    frames = [zstandard.compress(data[:999]), zstandard.compress(data[999:])]
    sizes = [struct.pack("<III", 0x184D2A50, 4, len(frame)) for frame in frames]
    return b"".join(size + frame for size, frame in zip(sizes, frames, strict=True))


def as_lz4(data: bytes) -> bytes:
    frame = pytest.importorskip("lz4.frame")
    return frame.compress(data[:999]) + frame.compress(data[999:])


COMPRESS = {
    "": lambda data: data,
    ".gz": two_gzip_members,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": two_zstd_frames,
    ".zstd": as_pzstd,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    ".lz4": as_lz4,
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 1000)
    monkeypatch.setattr("data_tools.preprocess.input.blocks.PEEK_BYTES", 64)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("end", [b"\n", b"", b"\r\n\n  \n"])
def test_compressed_files(suffix, end, corpus, documents, tmp_path, small_blocks):
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](corpus.read_bytes().rstrip() + end))
    assert main(["--input", str(path), "--output-prefix", str(tmp_path / "o"), *BYTES]) == 0
    assert tokens_of(tmp_path / "o") == expected(documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"PK\x03\x04...", "a zip archive is not supported"),
        ("a.jsonl.br", b"\x0b\x02\x80", "unsupported file type"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "unsupported file type"),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18\x40", "requires the lz4 package"),
    ],
)
def test_unsupported_formats_raise(name, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lz4", None)
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    path = tmp_path / name
    path.write_bytes(content)
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "o"), *BYTES]
    assert main([*arguments, "--on-error", "skip"]) == 2
    message_shown = capsys.readouterr().err
    assert f"{path}: " in message_shown and message in message_shown


def test_parquet(documents, tmp_path):
    table = pa.table({"n": list(range(len(documents))), "text": documents})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=70)
    arguments = ["--input", str(tmp_path / "c.parquet"), "--output-prefix", str(tmp_path / "o")]
    assert main([*arguments, *BYTES]) == 0
    assert tokens_of(tmp_path / "o") == expected(documents)


@pytest.mark.parametrize("compressed", [False, True])
def test_standard_input(compressed, corpus, documents, tmp_path):
    data = corpus.read_bytes()
    command = [sys.executable, "-m", "data_tools.preprocess_data", "--input", "-"]
    subprocess.run(
        [*command, "--output-prefix", str(tmp_path / "o"), *BYTES],
        input=gzip.compress(data) if compressed else data,
        check=True,
        capture_output=True,
    )
    assert tokens_of(tmp_path / "o") == expected(documents)


def test_folders_patterns_and_order(tmp_path, capsys):
    names = ["b/2.jsonl", "b/1.json.gz", "b/sub/0.ndjson", "b/readme.txt", "b/.hidden.jsonl", "a.x"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": name}).encode()
        path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    arguments = ["--input", str(tmp_path / "a.x"), str(tmp_path / "b"), "--output-prefix"]
    assert main([*arguments, str(tmp_path / "o"), *BYTES]) == 0
    assert tokens_of(tmp_path / "o") == expected(
        ["a.x", "b/1.json.gz", "b/2.jsonl", "b/sub/0.ndjson"]
    )
    found = find_input([str(tmp_path / "*.x"), str(tmp_path / "b" / "**" / "*.ndjson")])
    assert [Path(source.name).name for source in found.sources] == ["a.x", "0.ndjson"]
    assert "total" in capsys.readouterr().out


def test_ignored_files_are_reported(tmp_path, capsys):
    """Links are followed, suffixes are case-insensitive, and ignored files are listed."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / ".git").mkdir(parents=True)
    elsewhere.mkdir()
    names = ["corpus/D.JSONL", "corpus/e.jsonl.gzip", "corpus/wiki.jsonl", "elsewhere/f.json"]
    for name in names:
        line = json.dumps({"text": Path(name).name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith("gzip") else line)
    for name in ("wiki.idx", "notes.txt", "plain", ".hidden.jsonl", "x_rejected.jsonl"):
        (corpus / name).write_bytes(b"")
    (corpus / "made.idx").write_bytes(b"")
    (corpus / "made.json").write_text('{"format": "megatron_llmjp dataset manifest 1"}')
    # Another task of an array is about to write the .idx.
    another = corpus / "o_part00001of00002_text_document.json"
    another.write_bytes((corpus / "made.json").read_bytes())
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "same.jsonl").symlink_to(corpus / "D.JSONL")
    (corpus / "gone.jsonl").symlink_to(corpus / "nowhere")
    (elsewhere / "loop").symlink_to(corpus)
    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "o"), *BYTES]
    assert main(arguments) == 0
    documents = ["D.JSONL", "e.jsonl.gzip", "f.json", "wiki.jsonl"]
    assert tokens_of(tmp_path / "o") == expected(documents)
    assert "ignored: 12 files: 4 no known suffix" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "o_text_document.json").read_text())
    reasons = {Path(name).name: why for name, why in manifest["ignored"]["first"].items()}
    assert reasons == {
        "wiki.idx": "no known suffix",
        "made.idx": "no known suffix",
        "notes.txt": "no known suffix",
        "plain": "no known suffix",
        ".hidden.jsonl": "hidden",
        ".git": "a hidden folder",
        "x_rejected.jsonl": "lines rejected by preprocess_data",
        "made.json": "a dataset's manifest",
        "o_part00001of00002_text_document.json": "a dataset's manifest",
        "same.jsonl": f"the same file as {corpus / 'D.JSONL'}",
        "gone.jsonl": "a broken link",
        "loop": f"a link back to {corpus}",
    }
    by_pattern = find_input([str(tmp_path / "corp*")])
    assert by_pattern.sources == find_input([str(corpus)]).sources


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.jsonl"], "no such file or folder"),
        (["*.nothing"], "matches no file"),
        (["empty"], "no file in this folder"),
        (["c.jsonl", "./c.jsonl"], "already included"),
    ],
)
def test_input_errors(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.jsonl").write_text("")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_input(words)


def damaged_parquet(data: bytes) -> bytes:
    return b"PAR1" + data[:500]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".parquet"])
def test_truncated_files_leave_no_incomplete_output(suffix, corpus, tmp_path, capsys):
    compress = COMPRESS.get(suffix, damaged_parquet)
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(compress(corpus.read_bytes())[:-200])
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "out" / "o"), *BYTES]
    assert main([*arguments, "--on-error", "skip"]) == 2
    assert str(path) in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["o.partial"]


def test_empty_input_and_empty_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    (tmp_path / "c.jsonl").write_text("\n")
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    assert main(["--input", *inputs, "--output-prefix", str(tmp_path / "o"), *BYTES]) == 0
    assert tokens_of(tmp_path / "o") == b"x\xff"


@pytest.mark.parametrize("content", ["", "\n", '{"text": ""}\n', '{"txet": "a"}\n'])
def test_input_without_documents_fails(content, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(content)
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "p")]
    arguments += [*BYTES, "--on-error", "skip", "--max-rejected", "100%"]
    assert main(arguments) == 2
    assert "no tokens for --json-keys text" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".jsonl"] == ["p.partial"]
    assert main([*arguments, "--allow-empty"]) == 0
    assert read_index(tmp_path / "p_text_document").tokens == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(corpus, tmp_path):
    tmp_path.chmod(0o500)
    assert main(["--input", str(corpus), "--output-prefix", str(tmp_path / "o"), *BYTES]) == 2


def test_full_disk(corpus, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "o"), *BYTES]
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.preprocess.job.output.IndexedDatasetWriter.add", full)
        assert main(arguments) == 2
    assert f"{tmp_path / 'o.partial'}: No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["o.partial"]
    assert main(arguments) == 0
