"""Input from a web server that drops connections, ignores ranges, or refuses for a while.

The datasets are compared with those of the same file on the local disk.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.preprocess.input.remote.reading import MAX_CHUNKS, PARALLEL
from data_tools.preprocess.input.sources import find_input
from data_tools.preprocess.job.journal import ResumeJournal
from data_tools.preprocess_data import main
from data_tools.train_tokenizer import main as train_tokenizer
from tests.support.file_server import Faults, FileServer, file_server
from tests.support.timeouts import wait_until

pytest.importorskip("aiohttp", reason="https:// needs aiohttp: pip install aiohttp")

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "2"]
CHUNK = 20_000


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("data_tools.preprocess.input.remote.reading.CHUNK_BYTES", CHUNK)
    monkeypatch.setattr("data_tools.preprocess.input.remote.reading.MIN_REQUEST_BYTES", 500)
    monkeypatch.setattr("data_tools.preprocess.input.remote.failures.PAUSES", (0.001,) * 5)
    with file_server() as found:
        yield found


@pytest.fixture(scope="module")
def data(corpus: Path) -> dict[str, bytes]:
    """Return the corpus in several formats."""
    lines = corpus.read_bytes()
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    sink = pa.BufferOutputStream()
    table = pa.table({"n": list(range(len(texts))), "text": texts, "more": texts})
    pq.write_table(table, sink, row_group_size=70, compression="none")
    return {
        "/a.jsonl": lines,
        "/b.jsonl.gz": gzip.compress(lines, mtime=0),
        "/c.parquet": sink.getvalue().to_pybytes(),
    }


@pytest.fixture(scope="module")
def local(corpus: Path, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("local")
    assert main(["--input", str(corpus), "--output-prefix", str(folder / "o"), *BYTES]) == 0
    return dataset(folder)


def dataset(folder: Path) -> dict[str, bytes]:
    return {s: (folder / f"o_text_document{s}").read_bytes() for s in (".bin", ".idx")}


def preprocess(folder: Path, *words: str, flags: tuple[str, ...] = ()) -> int:
    return main(["--input", *words, "--output-prefix", str(folder / "o"), *BYTES, *flags])


FAULTS = {
    "none": {},
    "drops": {"drop_after": 6000},
    "drops at once": {"drop_after": 0, "drops": 3},
    "refuses": {"statuses": [(503, {}), (429, {"Retry-After": "0"}), (500, {})]},
    "no ranges": {"ignores_ranges": True},
    "no ranges, drops": {"ignores_ranges": True, "drop_after": 30_000, "drops": 3},
    "no ETag": {"without": ("ETag",)},
}


@pytest.mark.parametrize("name", ["/a.jsonl", "/b.jsonl.gz", "/c.parquet"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_server(fault, name, server: FileServer, data, local, tmp_path, capsys):
    server.files = data
    server.faults = Faults(**{k: v[:] if k == "statuses" else v for k, v in FAULTS[fault].items()})
    code = preprocess(tmp_path, server.address + name)
    message = capsys.readouterr().err
    if name == "/c.parquet" and "ranges" in fault:
        assert code == 2
        assert "the server ignores byte ranges" in message
        return
    assert code == 0, message
    assert dataset(tmp_path) == local
    assert ("neither ETag nor Last-Modified" in message) == (fault == "no ETag")
    if fault == "drops" and name != "/c.parquet":  # whose parts are not all read
        assert server.sent == len(data[name]) + 2  # a byte to find it, one to see that it stays
        assert len(server.requests) > len(data[name]) / 6000


def test_parts_of_one_file(server, data, local, tmp_path, monkeypatch):
    """The parts of an array read their range only, and are the whole together."""
    monkeypatch.setattr("data_tools.preprocess.array.shards.MIN_SPLIT_BYTES", 1000)
    monkeypatch.setattr("data_tools.preprocess.input.blocks.PEEK_BYTES", 1000)
    monkeypatch.setattr("data_tools.preprocess.input.remote.reading.BUFFER_BYTES", 1000)
    monkeypatch.setattr("data_tools.preprocess.input.remote.reading.CHUNK_BYTES", 5000)
    server.files = data
    merged = b""
    for part in range(3):
        flags = ("--shard", f"{part}/3")
        server.sent = 0
        assert preprocess(tmp_path, server.address + "/a.jsonl", flags=flags) == 0
        assert server.sent < len(data["/a.jsonl"]) / 3 + 3 * 5000
        prefix = tmp_path / f"o_part{part:05}of00003_text_document"
        merged += prefix.with_suffix(".bin").read_bytes()
    assert merged == local[".bin"]


def test_memory_is_bounded(server, data, local, tmp_path, monkeypatch):
    """Ranges are read ahead, but not the whole file."""
    monkeypatch.setattr("data_tools.preprocess.input.remote.reading.CHUNK_BYTES", 5000)
    monkeypatch.setattr("data_tools.preprocess.input.remote.reading.BUFFER_BYTES", 5000)
    server.files = data
    (source,) = find_input([server.address + "/a.jsonl"]).sources
    with source.open() as opened:
        assert opened.read(15_000) == data["/a.jsonl"][:15_000]
        opened.raw._threads.shutdown(wait=True)
        requested = {words for _, words in server.requests[1:]}
        assert len(requested) == len(server.requests) - 1  # no range twice
        assert 3 < len(requested) <= 3 + PARALLEL
        assert len(opened.raw._chunks) <= MAX_CHUNKS


def test_empty_and_compressed_transfers(server, tmp_path):
    """A transfer with Content-Encoding is decompressed by its contents, not by the client."""
    line = b'{"text": "x"}\n'
    server.files = {"/empty.jsonl": b"", "/a b.jsonl": gzip.compress(line)}
    server.faults = Faults(headers={"Content-Encoding": "gzip"})
    words = [f"{server.address}/empty.jsonl", f"{server.address}/a b.jsonl"]
    server.files["/a%20b.jsonl"] = server.files.pop("/a b.jsonl")
    assert preprocess(tmp_path, *words) == 0
    assert len(dataset(tmp_path)[".bin"]) == 4  # x and the end of the document


class Killed(BaseException):
    """Simulates kill -9: no code may run after it."""


@pytest.fixture
def eager(monkeypatch):
    """Save after every block, and use small blocks."""
    clock = itertools.count()
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 5000)
    monkeypatch.setattr(
        "data_tools.preprocess.job.job.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    for name in ("SECONDS_BETWEEN_SAVES", "SECONDS_AFTER_A_SOURCE"):
        monkeypatch.setattr(f"data_tools.preprocess.job.job.{name}", 0.5)


def die_at_save(number: int, patch: pytest.MonkeyPatch) -> None:
    original, left = ResumeJournal.add, [number]

    def dying(self, point):
        original(self, point)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    patch.setattr(ResumeJournal, "add", dying)


def kill_halfway(folder: Path, monkeypatch, *words: str) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at_save(12, patch)
        preprocess(folder, *words)


def test_a_killed_job_resumes_at_the_byte(
    server, data, local, tmp_path, monkeypatch, eager, capsys
):
    """The signature of the address may be another one; neither is printed or recorded."""
    server.files = data
    base = server.address.replace("://", "://user:pass_word@")
    kill_halfway(tmp_path, monkeypatch, f"{base}/a.jsonl?X-Amz-Signature=first_secret")
    journal = (tmp_path / "o.partial" / "journal.jsonl").read_text()
    position = json.loads(journal.splitlines()[-1])["position"]
    assert position > 50_000
    server.requests.clear()
    assert preprocess(tmp_path, f"{base}/a.jsonl?X-Amz-Signature=second_secret") == 0
    assert dataset(tmp_path) == local
    starts = [int(words[6:].partition("-")[0]) for _, words in server.requests]
    assert [start for start in starts if 0 < start < position - CHUNK] == []
    assert set(server.credentials) == {"Basic dXNlcjpwYXNzX3dvcmQ="}
    shown = capsys.readouterr()
    manifest = (tmp_path / "o_text_document.json").read_text()
    for text in (journal, manifest, shown.out, shown.err):
        assert "secret" not in text and "pass_word" not in text
    assert f'"name": "{server.address}/a.jsonl"' in manifest


@pytest.mark.parametrize("name", ["/b.jsonl.gz", "/c.parquet"])
def test_a_killed_job_resumes_in_other_formats(
    name, server, data, local, tmp_path, monkeypatch, eager, capsys
):
    monkeypatch.setattr("data_tools.preprocess.input.blocks.ROWS_PER_BLOCK", 10)
    server.files = data
    kill_halfway(tmp_path, monkeypatch, server.address + name)
    assert preprocess(tmp_path, server.address + name) == 0
    assert re.search(r"Resuming .*: \d\d+ documents are done", capsys.readouterr().err)
    assert dataset(tmp_path) == local


def test_a_file_that_changed_between_runs_is_refused(
    server, data, local, tmp_path, monkeypatch, eager, capsys
):
    server.files = dict(data)
    kill_halfway(tmp_path, monkeypatch, f"{server.address}/a.jsonl")
    server.files["/a.jsonl"] = data["/a.jsonl"].replace(b"x", b"y")
    assert preprocess(tmp_path, f"{server.address}/a.jsonl") == 2
    message = capsys.readouterr().err
    assert f"{server.address}/a.jsonl: the remote file has changed since" in message
    assert "--overwrite" in message
    server.files = data
    assert preprocess(tmp_path, f"{server.address}/a.jsonl") == 0
    assert dataset(tmp_path) == local
    server.files = {"/a.jsonl": data["/a.jsonl"] + b"\n"}
    assert preprocess(tmp_path, f"{server.address}/a.jsonl") == 2  # the dataset exists
    assert "the remote file has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("ignores_ranges", [False, True])
@pytest.mark.parametrize("size", ["same", "other"])
def test_a_file_that_changes_during_the_run_is_refused(
    ignores_ranges, size, server, data, tmp_path, capsys
):
    server.files = dict(data)
    new = data["/a.jsonl"].replace(b"n", b"m") + (b"\n" if size == "other" else b"")

    def replace_file(number: int) -> None:
        if number == 3:
            server.files["/a.jsonl"] = new

    server.faults = Faults(ignores_ranges=ignores_ranges, on_request=replace_file)
    assert preprocess(tmp_path, f"{server.address}/a.jsonl") == 2
    message = capsys.readouterr().err
    assert f"{server.address}/a.jsonl: the remote file changed while it was being read" in message
    assert [path.name for path in tmp_path.iterdir()] == ["o.partial"]


@pytest.mark.parametrize(
    ("word", "faults", "message"),
    [
        ("/none.jsonl", {}, "/none.jsonl: no such file or folder"),
        ("/a.jsonl", {"statuses": [(403, {})]}, "/a.jsonl: access denied (HTTP 403 Forbidden)"),
        ("/a.jsonl?key=secret", {"statuses": [(401, {})]}, "/a.jsonl: access denied (HTTP 401"),
        ("/a.jsonl", {"statuses": [(503, {})] * 9}, "HTTP 503 Service Unavailable, after 6"),
        ("/a.jsonl", {"without": ("Content-Length",), "ignores_ranges": True}, "the size of the"),
        ("/folder/", {}, "web servers cannot list folders"),
        ("/*.jsonl", {}, "web servers cannot list folders"),
        ("/a.jsonl?1 /a.jsonl?1", {}, "is already included"),
    ],
)
def test_errors_at_the_start(word, faults, message, server, data, tmp_path, capsys):
    server.files, server.faults = data, Faults(**faults)
    words = [server.address + part for part in word.split()]
    assert preprocess(tmp_path, *words) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "secret" not in shown and "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_stays_broken(server, data, tmp_path, capsys):
    """What was read is kept; the same command resumes."""
    server.files = data

    def break_connections(number: int) -> None:
        if number == 4:
            server.faults.drop_after = 0

    server.faults = Faults(on_request=break_connections)
    assert preprocess(tmp_path, f"{server.address}/a.jsonl") == 2
    message = capsys.readouterr().err
    assert f"{server.address}/a.jsonl: cannot be read at byte " in message
    assert "Run the same command again to resume" in message
    wait_until(lambda: not any(t.name.startswith("remote") for t in threading.enumerate()))


def test_closing_cancels_requests_without_an_answer(server, data, monkeypatch):
    """An interrupted program does not wait for them."""
    monkeypatch.setattr("data_tools.preprocess.input.remote.http_store.SECONDS_WITHOUT_DATA", 1e6)
    answers = threading.Event()
    answered = {f"bytes={words}" for words in ("0-0", "0-19999", "20000-39999")}

    def stall(number: int) -> None:
        if server.requests[number - 1][1] not in answered:
            answers.wait()

    server.files, server.faults = data, Faults(on_request=stall)
    (source,) = find_input([f"{server.address}/a.jsonl"]).sources
    with source.open() as opened:
        assert opened.read(CHUNK + 1) == data["/a.jsonl"][: CHUNK + 1]
        wait_until(lambda: len(server.requests) >= 4)
    wait_until(lambda: not any(t.name.startswith("remote") for t in threading.enumerate()))
    answers.set()


def test_the_sample_of_a_fast_encoder_is_remote_too(server, data, tokenizer_folder, tmp_path):
    """It reads the beginning of the file only, and the encoder is recorded."""
    server.files = data
    folder = str(tokenizer_folder)
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
    flags += ["--fast-encoder", f"{folder}/tokenizer.model", "--workers", "2"]
    words = ["--input", f"{server.address}/a.jsonl", "--output-prefix", str(tmp_path / "o")]
    assert main([*words, *flags]) == 0
    assert (tmp_path / "o_text_document.idx").exists()


def test_addresses_that_differ_in_the_query(server, tmp_path):
    server.files = {"/get?id=1": b'{"text": "a"}', "/get?id=2": b'{"text": "b"}'}
    words = [f"{server.address}/get?id={number}" for number in (1, 2)]
    assert preprocess(tmp_path, *words) == 0
    manifest = json.loads((tmp_path / "o_text_document.json").read_text())
    names = [f"{server.address}/get", f"(2) {server.address}/get"]
    assert [source["name"] for source in manifest["recipe"]["sources"]] == names
    assert list(manifest["statistics"]["sources"]) == names


def test_train_tokenizer(server, data, documents, tmp_path, capsys):
    """The vocabulary is that of the local file; plain text is read too."""
    server.files = {"/a.jsonl": data["/a.jsonl"], "/b.txt.gz": gzip.compress(b"plain text\n" * 9)}
    (tmp_path / "a.jsonl").write_bytes(data["/a.jsonl"])
    (tmp_path / "b.txt.gz").write_bytes(server.files["/b.txt.gz"])
    for place in (str(tmp_path), server.address):
        words = [f"{place}/a.jsonl", f"{place}/b.txt.gz"]
        folder = tmp_path / str(len(place))
        arguments = ["--input", *words, "--vocab-size", "700", "--output-dir", str(folder)]
        assert train_tokenizer(arguments) == 0, capsys.readouterr().err
    models = [path.read_bytes() for path in sorted(tmp_path.glob("*/tokenizer.model"))]
    assert len(models) == 2 and models[0] == models[1]
