"""Input from S3 (moto's server, and one that fails) and from a stand-in of the Hugging Face Hub."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.preprocess.input.sources import find_input
from data_tools.preprocess_data import main
from megatron_llmjp.errors import UserError
from tests.support.file_server import Faults, FileServer, file_server

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "2"]
SECRET = "secret_key_of_this_test"
COMMIT = "c" * 40


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "http_proxy", "AWS_PROFILE", "AWS_SESSION_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the repetitions of botocore itself
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr("data_tools.preprocess.input.remote.reading.CHUNK_BYTES", 50_000)
    monkeypatch.setattr("data_tools.preprocess.input.remote.reading.MIN_REQUEST_BYTES", 500)
    monkeypatch.setattr("data_tools.preprocess.input.remote.failures.PAUSES", (0.001,) * 12)


@pytest.fixture(scope="module")
def files(corpus: Path) -> dict[str, bytes]:
    """Return the files of a corpus by name; some of them are not input."""
    lines = corpus.read_bytes()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["one", "two", "three"]}), sink)
    return {
        "data/a.jsonl": lines,
        "data/b.jsonl.gz": gzip.compress(lines, mtime=0),
        "data/sub/c.parquet": sink.getvalue().to_pybytes(),
        "data/sub/d[1].jsonl": b'{"text": "magic"}\n',
        "data/.cache/e.jsonl": b"{}",
        "data/.f.jsonl": b"{}",
        "data/g.json": b'{"format": "megatron_llmjp dataset manifest 1"}',
        "data/g.idx": b"-",
        "data/h.partial/i.jsonl": b"{}",
        "data/x_rejected.jsonl": b"{}",
        "readme.txt": b"-",
    }


READ = ["data/a.jsonl", "data/b.jsonl.gz", "data/sub/c.parquet", "data/sub/d[1].jsonl"]
IGNORED = {
    "data/.cache/e.jsonl": "in a hidden folder",
    "data/.f.jsonl": "hidden",
    "data/g.idx": "no known suffix",
    "data/g.json": "a dataset's manifest",
    "data/h.partial/i.jsonl": "unfinished output",
    "data/x_rejected.jsonl": "lines rejected by preprocess_data",
}


@pytest.fixture(scope="module")
def local(files, tmp_path_factory) -> bytes:
    """Return the dataset of the same files on the local disk."""
    folder = tmp_path_factory.mktemp("local")
    for name in READ:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[name])
    words = [str(folder / "data"), "--output-prefix", str(folder / "o")]
    assert main(["--input", *words, *BYTES]) == 0
    return (folder / "o_text_document.bin").read_bytes()


def preprocess(folder: Path, word: str, *flags: str) -> int:
    return main(["--input", word, "--output-prefix", str(folder / "o"), *BYTES, *flags])


def expansions(words: dict[str, list[str] | str], root: str) -> None:
    """Check to which files words are expanded, or the error."""
    for word, expected in words.items():
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                find_input([word])
            continue
        found = [source.name for source in find_input([word]).sources]
        assert found == [f"{root}/{name}" for name in expected], word


def check_a_folder(root: str, local: bytes, folder: Path, capsys) -> None:
    """Check the dataset of all files, and what is printed and recorded."""
    assert preprocess(folder, f"{root}/data") == 0
    assert (folder / "o_text_document.bin").read_bytes() == local
    manifest = (folder / "o_text_document.json").read_text()
    names = [source["name"] for source in json.loads(manifest)["recipe"]["sources"]]
    assert names == [f"{root}/{name}" for name in READ]
    ignored = json.loads(manifest)["ignored"]["first"]
    assert ignored == {f"{root}/{name}": reason for name, reason in IGNORED.items()}
    shown = capsys.readouterr()
    assert "ignored: 6 files" in shown.err
    assert SECRET not in manifest + shown.out + shown.err


@pytest.fixture(scope="module")
def bucket(files):
    """Return moto's client of a bucket ``corpus`` with these files."""
    for package in ("s3fs", "flask"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[s3]' flask flask-cors")
    import boto3

    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=address, **keys)
    client.create_bucket(Bucket="corpus")
    for name, content in (files | {"data/": b""}).items():
        client.put_object(Bucket="corpus", Key=name, Body=content)
    yield client
    server.stop()


def test_s3(bucket, local, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.meta.endpoint_url)
    check_a_folder("s3://corpus", local, tmp_path, capsys)
    words = {
        "s3://corpus/data/a.jsonl": READ[:1],
        "s3://corpus/data/sub/d[1].jsonl": READ[3:],
        "s3://corpus/data/*.jsonl*": ["data/a.jsonl", "data/b.jsonl.gz", "data/x_rejected.jsonl"],
        "s3://corpus/data/**/*.parquet": READ[2:3],
        "s3://corpus/data/s*": READ[2:],
        "s3://corpus/none.jsonl": "no such file or folder",
        "s3://nobody/a.jsonl": "no such file or folder",
        "s3://corpus/*.none": "matches no file",
    }
    expansions(words, "s3://corpus")


def test_an_object_that_is_replaced_is_refused(bucket, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.meta.endpoint_url)
    (source,) = find_input(["s3://corpus/data/a.jsonl"]).sources
    assert source.identity()["content"] == hashlib.md5(files["data/a.jsonl"]).hexdigest()
    new = files["data/a.jsonl"] + b"\n"
    try:
        with source.open() as opened:
            assert opened.read(1000) == files["data/a.jsonl"][:1000]
            bucket.put_object(Bucket="corpus", Key="data/a.jsonl", Body=new)
            with pytest.raises(UserError, match="the remote file changed while"):
                opened.read()
    finally:
        bucket.put_object(Bucket="corpus", Key="data/a.jsonl", Body=files["data/a.jsonl"])


@pytest.fixture
def server(monkeypatch):
    with file_server() as found:
        found.allows_head = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.address)
        url = found.address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (
            ("ENDPOINT", found.address),
            ("HUGGINGFACE_CO_URL_TEMPLATE", url),
            ("HF_HUB_OFFLINE", False),  # set by tests/conftest.py
        ):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield found


@pytest.mark.parametrize(
    "faults", [{"drop_after": 7000}, {"statuses": [(503, {}), (500, {}), (503, {})]}]
)
def test_s3_with_faults(faults, server: FileServer, files, tmp_path):
    pytest.importorskip("s3fs", reason="s3:// needs s3fs: pip install s3fs")
    lines = files["data/a.jsonl"]
    server.files, server.faults = {"/corpus/a.jsonl": lines}, Faults(**faults)
    (tmp_path / "a.jsonl").write_bytes(lines)
    assert preprocess(tmp_path, "s3://corpus/a.jsonl") == 0
    remote = (tmp_path / "o_text_document.bin").read_bytes()
    assert server.sent == len(lines)
    (tmp_path / "o_text_document.idx").unlink()
    assert preprocess(tmp_path, str(tmp_path / "a.jsonl"), "--overwrite") == 0
    assert remote == (tmp_path / "o_text_document.bin").read_bytes()


@pytest.mark.parametrize("status", [403, 401])
def test_s3_without_access(status, server, tmp_path, capsys):
    pytest.importorskip("s3fs", reason="s3:// needs s3fs: pip install s3fs")
    server.faults = Faults(statuses=[(status, {})] * 3)
    assert preprocess(tmp_path, "s3://corpus/a.jsonl") == 2
    message = capsys.readouterr().err
    assert "s3://corpus/a.jsonl: access denied" in message and "AWS_PROFILE" in message


def hub_of(files: dict[str, bytes], commit: str) -> dict[str, bytes]:
    """Return the answers of the Hub on a dataset ``org/name``; files above 1 kB are in LFS."""
    entries = {name.rpartition("/")[0]: [] for name in files}
    for name, content in files.items():
        folder = name.rpartition("/")[0]
        oid = hashlib.sha1(content).hexdigest()
        entry = {"type": "file", "path": name, "oid": oid, "size": len(content)}
        if len(content) > 1000:
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
        entries[folder].append(entry)
        while folder:
            entry = {"type": "directory", "path": folder, "oid": "d" * 40, "size": 0}
            folder = folder.rpartition("/")[0]
            if entry not in entries.setdefault(folder, []):
                entries[folder].append(entry)
    api = "/api/datasets/org/name"
    info = {"id": "org/name", "sha": commit, "private": False, "tags": [], "siblings": []}
    answers = {api + path: json.dumps(info).encode() for path in ("", "/revision/main")}
    answers[f"{api}/revision/{commit}"] = json.dumps(info).encode()
    for folder in entries:
        address = f"{api}/tree/{commit}/{quote(folder, safe='')}".rstrip("/")
        start = f"{folder}/" if folder else ""
        below = [e for of in entries.values() for e in of if e["path"].startswith(start)]
        answers[address + "?recursive=false&expand=false"] = json.dumps(entries[folder]).encode()
        answers[address + "?recursive=true&expand=false"] = json.dumps(below).encode()
    for name, content in files.items():
        path = name.replace("[", "%5B").replace("]", "%5D")
        answers[f"/datasets/org/name/resolve/{commit}/{path}"] = content
    return answers


def test_hub(server, files, local, tmp_path, monkeypatch, capsys):
    """All requests are for the commit that the revision was when the program started."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    server.files = hub_of(files, COMMIT)
    root = "hf://datasets/org/name"
    check_a_folder(root, local, tmp_path, capsys)
    contents = [path for path, _ in server.requests if "/resolve/" in path]
    assert contents and all(f"/resolve/{COMMIT}/" in path for path in contents)
    sent = zip(server.requests, server.credentials, strict=True)
    assert {found for (path, _), found in sent if "org/name" in path} == {f"Bearer {SECRET}"}
    words = {
        f"{root}/data/a.jsonl": READ[:1],
        f"{root}/data/sub": READ[2:],
        f"{root}/data/*/*.parquet": READ[2:3],
        f"{root}/none.jsonl": "no such file or folder",
        "hf://datasets/org/other/a.jsonl": "no such repository or revision",
        "hf://buckets/org/name": "storage buckets",
    }
    expansions(words, root)
    (source,) = find_input([f"{root}@main/data/a.jsonl"]).sources
    assert source.name == f"{root}@main/data/a.jsonl"
    assert source.identity()["content"] == hashlib.sha256(files["data/a.jsonl"]).hexdigest()
    small = find_input([f"{root}/data/sub"]).sources[1]
    assert small.identity()["content"] == hashlib.sha1(files["data/sub/d[1].jsonl"]).hexdigest()


def test_hub_with_faults(server, files, tmp_path, monkeypatch):
    """Requests are divided until they arrive whole: the Hub's library keeps no parts of them."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    lines = files["data/a.jsonl"]
    server.files = hub_of({"a.jsonl": lines}, COMMIT)
    (source,) = find_input(["hf://datasets/org/name/a.jsonl"]).sources
    server.faults = Faults(drop_after=7000)
    with source.open() as opened:
        assert opened.read() == lines
