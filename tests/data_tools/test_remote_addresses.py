"""Remote addresses: what is printed of them, what is refused, and which errors are repeated."""

from __future__ import annotations

import subprocess
import sys

import pytest

from data_tools.merge_datasets import main as merge_datasets
from data_tools.preprocess.input.remote import failures
from data_tools.preprocess.input.remote.addresses import encode_url, scrub, shown
from data_tools.preprocess_data import main
from data_tools.train_tokenizer import main as train_tokenizer
from tests.support.processes import ROOT

BYTES = ["--tokenizer-type", "ByteLevelTokenizer"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://u:p@host:8/a%20b.jsonl?X-Amz-Signature=s#f", "https://host:8/a%20b.jsonl"),
        ("HTTPS://token@host/a@b.jsonl", "https://host/a@b.jsonl"),
        ("s3://key:secret@bucket/a?b@c#d", "s3://bucket/a?b@c#d"),
        ("hf://org/model@refs%2Fpr%2F1/a.jsonl", "hf://org/model@refs%2Fpr%2F1/a.jsonl"),
        ("hf://gpt2@main/a.jsonl", "hf://gpt2@main/a.jsonl"),
        ("hf://user:token@datasets/a", "hf://datasets/a"),
        ("local/path", "local/path"),
    ],
)
def test_no_credentials_are_shown(address, expected):
    assert shown(address) == expected


def test_messages_of_libraries():
    text = "403, url='https://u:p@host/a.jsonl?sig=1&key=2', see http://h/x?y."
    assert scrub(text) == "403, url='https://host/a.jsonl', see http://h/x"


def test_encoded_characters_stay():
    assert encode_url("https://h/a b/猫%2F?s=%2B+=/#x") == "https://h/a%20b/%E7%8C%AB%2F?s=%2B+=/"


@pytest.mark.parametrize(
    ("address", "package"),
    [
        ("https://h/a.jsonl", "aiohttp"),
        ("s3://b/a.jsonl", "s3fs"),
        ("hf://a/b/c.jsonl", "huggingface_hub"),
    ],
)
def test_missing_packages(address, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--input", address, "--output-prefix", str(tmp_path / "o"), *BYTES]) == 2
    message = f"--input {address}: reading it requires the package {package}: pip install {package}"
    assert capsys.readouterr().err == f"preprocess_data: {message}\n"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/a.jsonl", "gs:// is not supported. Remote input can be s3://, hf://"),
        ("file:///data/a.jsonl", "give the path without file://"),
        ("s3://key:secret@bucket/a.jsonl", "s3:// addresses must not contain credentials"),
    ],
)
def test_refused_addresses(address, message, tmp_path, capsys):
    assert main(["--input", address, "--output-prefix", str(tmp_path / "o"), *BYTES]) == 2
    shown_message = capsys.readouterr().err
    assert message in shown_message and "secret" not in shown_message


def test_output_is_local(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    remote = "s3://bucket/data/ja"
    for program, arguments in (
        (main, ["--input", "a.jsonl", "--output-prefix", remote, *BYTES]),
        (main, ["--input", "a.jsonl", "--output-prefix", "o", "--report", f"{remote}.csv", *BYTES]),
        (train_tokenizer, ["--input", "a", "--vocab-size", "500", "--output-dir", remote]),
        (merge_datasets, ["--input", "a", "--output-prefix", remote]),
    ):
        assert program(arguments) == 2
        assert "output is written to a local or mounted disk only" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_local_files_need_no_library_of_remote_files(tmp_path):
    """They are neither read through fsspec nor delayed by its import."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    code = f"""\
import sys
from data_tools.preprocess_data import main
arguments = ["--input", "{tmp_path}/a.jsonl", "--output-prefix", "{tmp_path}/o", *{BYTES}]
assert main(arguments) == 0
assert not {{"fsspec", "aiohttp", "s3fs", "huggingface_hub"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


class Response(Exception):
    """An error with attributes as those of the libraries."""

    def __init__(self, **attributes: object) -> None:
        super().__init__("https://h/a?secret")
        vars(self).update(attributes)


BOTO = {"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "7"}}}


@pytest.mark.parametrize(
    ("error", "is_transient", "seconds"),
    [
        (Response(status=429, headers={"Retry-After": "3"}), True, 3),
        (Response(status=404), False, 0),
        (Response(response=BOTO), True, 7),
        (Response(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), True, 0),
        (Response(status=503, headers={"Retry-After": "soon"}), True, 0),
        (Response(status=503, headers={"Retry-After": "99999"}), True, 300),
        (ConnectionResetError(104, "reset"), True, 0),
        (TimeoutError(), True, 0),
        (PermissionError("no"), False, 0),
        (type("NoCredentialsError", (Exception,), {})(), False, 0),
        (FileNotFoundError("x"), False, 0),
    ],
)
def test_transient_errors(error, is_transient, seconds):
    assert failures.is_transient(error) == is_transient
    assert failures.retry_after(error) == seconds
    assert "secret" not in failures.describe(error)
