"""Invalid lines: reported and counted, without a hang or a traceback."""

from __future__ import annotations

import csv
import gzip
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_tools.preprocess.encoding.encode import BlockEncoder, EncodingOptions
from data_tools.preprocess.input import json_lines
from data_tools.preprocess_data import main
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.tokenizers import load_tokenizer

LONG = b'{"text": "' + b"x" * 1_200_000 + b'"}'
BAD = {
    b'{"text": "broken': "not valid JSON",
    b"[" * 100_000: "not valid JSON",
    b'["text"]': "not a JSON object",
    b'{"txt": "a"}': "missing key",
    b'{"text": 7}': "not a string",
    b'{"text": null}': "not a string",
    b'{"text": ["a", 1]}': "not a string",
    b'{"text": "\xe3\x81"}': "invalid UTF-8",
    b'{"text": "\\ud83d"}': "lone surrogate",
    LONG: "line too long",
}
GOOD = [
    b'{"text": "a", "n": NaN}',
    b'\xef\xbb\xbf{"text": "b\\u0000"}',
    b' {"text": "\\ud83d\\ude00"}\r',
]
BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--workers", "2", "--max-line-mb", "1"]


@pytest.fixture(params=["orjson", "json"], autouse=True)
def parser(request, monkeypatch):
    if request.param == "json":
        monkeypatch.setattr(json_lines, "orjson", None)
    elif json_lines.orjson is None:
        pytest.skip("orjson is not installed")


@pytest.mark.parametrize("line", BAD, ids=BAD.values())
def test_stop_names_file_and_line(line, tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    path.write_bytes(GOOD[0] + b"\n\n" + line + b"\n" + GOOD[1])
    assert main(["--input", str(path), "--output-prefix", str(tmp_path / "o"), *BYTES]) == 2
    message = capsys.readouterr().err
    assert f"{path}:3: {BAD[line]}" in message
    assert "--on-error" in message and "Traceback" not in message
    assert {p.name for p in tmp_path.iterdir()} == {"c.jsonl", "o.partial"}


@pytest.mark.parametrize("compressed", [False, True])
def test_skip_and_quarantine(compressed, tmp_path, capsys):
    lines = [GOOD[0], *BAD, GOOD[1], b'{"text": ""}', GOOD[2]]
    data = b"\n".join(lines)
    path = tmp_path / "c.jsonl"
    path.write_bytes(gzip.compress(data) if compressed else data)
    for policy in ("skip", "quarantine"):
        arguments = ["--input", str(path), "--output-prefix", str(tmp_path / policy), *BYTES]
        assert main([*arguments, "--on-error", policy, "--max-rejected", "90%"]) == 0
        assert f"{path}:2: not valid JSON" in capsys.readouterr().err
        index = read_index(tmp_path / f"{policy}_text_document")
        assert bytes(index.read_tokens().astype("u1")) == b"ab\0" + "😀".encode()
        manifest = json.loads((tmp_path / f"{policy}_text_document.json").read_text())
        assert sum(manifest["rejected"].values()) == len(BAD) + 1
        assert manifest["rejected"]["lone surrogate"] == manifest["rejected"]["empty document"] == 1
    aside = (tmp_path / "quarantine_rejected.jsonl").read_bytes()
    assert aside == b"\n".join([*BAD, b'{"text": ""}']) + b"\n"
    with (tmp_path / "quarantine_rejected.csv").open(newline="") as file:
        reasons = [(int(row["line"]), row["reason"]) for row in csv.DictReader(file)]
    assert reasons == [*enumerate(BAD.values(), start=2), (len(BAD) + 3, "empty document")]
    assert not (tmp_path / "skip_rejected.jsonl").exists()


def test_an_empty_document_is_reported_and_kept(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": ""}\n')
    assert main(["--input", str(path), "--output-prefix", str(tmp_path / "o"), *BYTES]) == 0
    assert f"{path}:2: empty document" in capsys.readouterr().err
    assert read_index(tmp_path / "o_text_document").documents == 2  # as Megatron-LM


def test_rejected_share_is_limited(tmp_path, capsys, monkeypatch):
    """One bad line in 200 is allowed by default; three require a larger limit."""
    path = tmp_path / "c.jsonl"
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "o"), *BYTES]
    arguments += ["--on-error", "skip"]
    path.write_bytes(b'{"text": "a"}\n' * 199 + b"bad\n")
    assert main([*arguments, "--output-prefix", str(tmp_path / "one")]) == 0
    path.write_bytes(b'{"text": "a"}\n' * 197 + b"bad\n" * 3)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "3 of 200 lines were rejected (1.5%): not valid JSON 3" in message
    assert not (tmp_path / "o_text_document.idx").exists()
    with monkeypatch.context() as patch:
        patch.setattr(
            "data_tools.preprocess.job.job.read_blocks", lambda *_: 1 / 0
        )  # nothing is read again
        assert main([*arguments, "--max-rejected", "2%"]) == 0
    assert read_index(tmp_path / "o_text_document").documents == 197
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--max-rejected", "1"])
    assert "--max-rejected" in capsys.readouterr().err


def test_mostly_invalid_input_stops_early(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 1000)
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 50_000)
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "o"), *BYTES]
    assert main([*arguments, "--on-error", "skip", "--json-keys", "txet"]) == 2
    found = re.search(r"([\d,]+) of \1 lines were rejected", capsys.readouterr().err)
    assert found is not None and int(found[1].replace(",", "")) < 2000


def test_invalid_numbers_are_bad_lines(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "1 2"}\n{"text": "1 x"}\n{"text": "9"}\n')
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "o"), "--on-error", "skip"]
    arguments += ["--max-rejected", "0.9"]
    assert main([*arguments, "--tokenizer-type", "NullTokenizer", "--vocab-size", "5"]) == 0
    message = capsys.readouterr().err
    assert f"{path}:2: not encodable" in message and f"{path}:3: not encodable" in message
    assert read_index(tmp_path / "o_text_document").tokens == 2


JSON_LIKE = st.builds(
    lambda value: json.dumps({"text": value}).encode(),
    st.one_of(st.text(), st.none(), st.lists(st.text(), max_size=3), st.integers()),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.one_of(st.binary(max_size=40), JSON_LIKE), max_size=12))
@example([b'{"text": "\\ud800"}', b"\x00", b'{"text": "a"}'])
def test_any_bytes_are_either_documents_or_rejected(lines):
    """Fuzz: each line is a document or rejected, and documents can be read back."""
    data = b"\n".join(lines)
    encoder = BlockEncoder(
        load_tokenizer("ByteLevelTokenizer", None), EncodingOptions(["text"], True, True, 30, True)
    )
    result = encoder.encode(data)
    count = len(data.split(b"\n")) - (not data or data.endswith(b"\n"))
    packed = result.packed["text"]
    assert result.lines == count
    assert count == len(packed.sequences) + len(result.rejected) + result.blank
    assert packed.lengths.sum() == len(packed.tokens)
    assert packed.sequences.sum() == len(packed.lengths)
    assert all(data.split(b"\n")[bad.line] == bad.raw for bad in result.rejected)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(min_size=1, max_size=300), st.sampled_from([b"", b"\x1f\x8b", b"(\xb5/\xfd", b"PAR1"])
)
def test_any_file_ends_in_a_message(data, magic):
    """Fuzz: random bytes as an input file, also after the magic numbers of known formats."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.jsonl"
        path.write_bytes(magic + data)
        arguments = ["--input", str(path), "--output-prefix", f"{folder}/o", *BYTES]
        assert main([*arguments, "--on-error", "skip"]) in (0, 2)
