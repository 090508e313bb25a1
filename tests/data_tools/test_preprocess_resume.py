"""Resumption of preprocess_data: after a kill at any time the output has the same bytes."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools.preprocess.job.job import PreprocessJob
from data_tools.preprocess_data import main
from tests.data_tools.conftest import make_documents, write_jsonl
from tests.support.timeouts import PROCESS_TIMEOUT, wait_until

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "2"]
BYTES += ["--record-sources", "--id-key", "n"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    return [
        str(write_jsonl(folder / f"{at}.jsonl", make_documents(400, seed=at))) for at in range(4)
    ]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["--input", *inputs, "--output-prefix", str(folder / "o"), *BYTES]) == 0
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Killed(BaseException):
    """Simulates kill -9: no code may run after it."""


@pytest.fixture(params=[1, 5], ids=["every block saved", "every few blocks saved"])
def eager(request, monkeypatch):
    """Use small blocks, and a clock that advances with each call."""
    clock = itertools.count()
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 20000)
    monkeypatch.setattr(
        "data_tools.preprocess.job.job.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    monkeypatch.setattr("data_tools.preprocess.job.job.SECONDS_BETWEEN_SAVES", request.param - 0.5)
    monkeypatch.setattr("data_tools.preprocess.job.job.SECONDS_AFTER_A_SOURCE", request.param - 0.5)


@pytest.mark.parametrize("where", ["add", "save", "finish", "rename"])
def test_kills_at_all_stages(where, inputs, undisturbed, tmp_path, monkeypatch, eager, capsys):
    """Fault injection: die in the n-th call of a function, repeatedly, until the run completes."""
    target = {
        "add": "data_tools.preprocess.job.output.IndexedDatasetWriter.add",
        "save": "data_tools.preprocess.job.journal.ResumeJournal.add",
        "finish": "data_tools.preprocess.job.output.IndexedDatasetWriter.finish",
        "rename": "pathlib.Path.replace",
    }[where]
    module, _, name = target.rpartition(".")
    owner = {"pathlib.Path": Path}.get(module)
    if owner is None:
        parent, _, cls = module.rpartition(".")
        owner = getattr(sys.modules[parent], cls)
    original = getattr(owner, name)
    draw = random.Random(7)
    arguments = ["--input", *inputs, "--output-prefix", str(tmp_path / "o"), *BYTES]
    for attempt in range(60):
        left = 1 if where in ("finish", "rename") and attempt < 3 else draw.randint(1, 25)

        def dying(self, *args, _left=[left], **kwargs):  # noqa: B006
            _left[0] -= 1
            after = draw.random() < 0.5
            if _left[0] == 0 and not after:
                raise Killed
            result = original(self, *args, **kwargs)
            if _left[0] == 0:
                raise Killed
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            try:
                code = main(arguments)
                break
            except Killed:
                made = {p.name for p in tmp_path.iterdir()} - {"o.partial"}
                assert "o_text_document.idx" not in made or where == "rename"
    assert code == 0
    assert files(tmp_path) == undisturbed
    assert attempt > 0


def test_kill_9(inputs, undisturbed, tmp_path):
    """Real processes, killed at random moments; no worker outlives its parent."""
    command = [sys.executable, "-m", "data_tools.preprocess_data", "--input", *inputs]
    command += ["--output-prefix", str(tmp_path / "o"), *BYTES]
    draw = random.Random(3)
    for _ in range(4):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.15, 0.5))
        process.send_signal(signal.SIGKILL)
        # Returns when the last worker has closed the inherited stderr.
        process.communicate(timeout=PROCESS_TIMEOUT)
    subprocess.run(command, check=True, capture_output=True)
    assert files(tmp_path) == undisturbed


def test_finished_files_are_not_repeated(inputs, undisturbed, tmp_path, capsys, eager):
    """After a bad line in the third file is fixed, the run resumes in that file."""
    third = Path(inputs[2])
    whole = third.read_bytes()
    third.write_bytes(whole + b"broken")
    arguments = ["--input", *inputs, "--output-prefix", str(tmp_path / "o"), *BYTES]
    assert main(arguments) == 2
    assert f"{third}:401: not valid JSON" in capsys.readouterr().err
    third.write_bytes(whole)
    assert main(arguments) == 0
    found = re.search(r"(\d+) documents are done, (\d) of 4 files", capsys.readouterr().err)
    assert found is not None
    done, finished = map(int, found.groups())
    assert (done, finished) == (800, 2) or (700 < done < 800 and finished == 1)
    assert files(tmp_path) == undisturbed


def test_ctrl_c(inputs, undisturbed, tmp_path):
    # A pipe that stays open keeps the program waiting for input.
    command = [sys.executable, "-m", "data_tools.preprocess_data", "--output-prefix"]
    command += [str(tmp_path / "p"), *BYTES, "--input", *inputs[:2], "-"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_until((tmp_path / "p.partial" / "journal.jsonl").exists)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 130
    assert b"interrupted" in err and b"Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["p.partial"]


def test_repeated_and_changed_commands(inputs, undisturbed, tmp_path, capsys):
    arguments = ["--input", inputs[0], "--output-prefix", str(tmp_path / "o"), *BYTES]
    assert main(arguments) == 0
    before = files(tmp_path)
    assert main(arguments) == 0
    assert "Already complete" in capsys.readouterr().out
    assert main([*arguments, "--input", inputs[1]]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files(tmp_path) == before
    assert main([*arguments, "--input", inputs[1], "--overwrite"]) == 0
    assert files(tmp_path) != before


def test_another_run_in_the_work_folder_raises(inputs, tmp_path, monkeypatch, eager, capsys):
    arguments = ["--input", *inputs, "--output-prefix", str(tmp_path / "o"), *BYTES]
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.preprocess.job.output.DatasetOutput.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    other = [word for word in arguments if word != "--append-eod"]
    assert main(other) == 2
    assert "unfinished run with another options" in capsys.readouterr().err
    assert main([*other, "--overwrite"]) == 0


def test_input_that_changes_during_the_run_raises(inputs, tmp_path, monkeypatch, capsys):
    """Lines appended during the run end it; the next run repeats that file."""
    paths = [tmp_path / f"{at}.jsonl" for at in range(3)]
    for path, source in zip(paths, inputs, strict=False):
        path.write_bytes(Path(source).read_bytes())
    arguments = ["--input", *map(str, paths), "--output-prefix", str(tmp_path / "o"), *BYTES]
    finish = PreprocessJob._encode_all

    def appended(self, journal):
        finish(self, journal)
        with paths[1].open("a") as file:
            file.write('{"text": "late"}\n')
        os.utime(paths[0])  # only the modification time

    with monkeypatch.context() as patch:
        patch.setattr(PreprocessJob, "_encode_all", appended)
        assert main(arguments) == 2
    assert f"{paths[1]}: the file changed while it was being read" in capsys.readouterr().err
    assert not (tmp_path / "o_text_document.idx").exists()
    assert main(arguments) == 0
    assert main([*arguments, "--output-prefix", str(tmp_path / "p")]) == 0
    assert (tmp_path / "o_text_document.bin").read_bytes() == (
        tmp_path / "p_text_document.bin"
    ).read_bytes()


def test_another_path_or_time_is_the_same_input(inputs, tmp_path, monkeypatch, capsys):
    path = tmp_path / "in.jsonl"
    path.write_bytes(Path(inputs[0]).read_bytes())
    monkeypatch.chdir(tmp_path)
    common = ["--output-prefix", str(tmp_path / "o"), *BYTES]
    assert main(["--input", "in.jsonl", *common]) == 0
    os.utime(path, (1, 1))
    assert main(["--input", str(path), *common]) == 0
    assert "Already complete" in capsys.readouterr().out
    with path.open("r+b") as file:  # the same size, other contents
        file.seek(20)
        file.write(b"X")
    assert main(["--input", str(path), *common]) == 2


def test_a_corrected_command_is_accepted(inputs, tmp_path, capsys):
    arguments = ["--input", inputs[0], "--output-prefix", str(tmp_path / "o"), *BYTES]
    arguments += ["--on-error", "skip"]
    assert main([*arguments, "--json-keys", "txet"]) == 2
    assert "rejected" in capsys.readouterr().err
    assert main(arguments) == 0
    assert json.loads((tmp_path / "o_text_document.json").read_text())["documents"] == 400


def test_manifest_and_reports(inputs, tmp_path, capsys):
    arguments = ["--input", *inputs[:2], "--output-prefix", str(tmp_path / "o"), *BYTES]
    reports = ["--report", str(tmp_path / "r.csv"), "--report", str(tmp_path / "r.json")]
    assert main([*arguments, *reports]) == 0
    manifest = json.loads((tmp_path / "o_text_document.json").read_text())
    table = json.loads((tmp_path / "r.json").read_text())
    assert [row["source"] for row in table] == [*inputs[:2], "total"]
    assert table[-1]["tokens_text"] == manifest["tokens"]
    assert table[-1]["documents"] == manifest["documents"] == 800
    for row, at in zip(table, (0, 1), strict=False):
        texts = [text.encode() for text in make_documents(400, seed=at)]
        assert row["documents"] == 400 and row["empty"] == texts.count(b"")
        assert row["tokens_text"] == sum(len(text) + 1 for text in texts if text)
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{key: str(value) for key, value in row.items()} for row in table]
    assert manifest["recipe"]["tokenizer"]["type"] == "ByteLevelTokenizer"
    for suffix in ("bin", "idx"):
        data = (tmp_path / f"o_text_document.{suffix}").read_bytes()
        size = {"bytes": len(data)} if suffix == "bin" else {}
        assert manifest[suffix] == {**size, "crc32": f"{zlib.crc32(data):08x}"}
    read = IndexedDataset(str(tmp_path / "o_text_document"))
    assert manifest["tokens"] == int(read.sequence_lengths.sum())
    assert manifest["documents"] == len(read.document_indices) - 1
    assert main([*arguments, "--report", "r.txt", "--overwrite"]) == 2
