"""preprocess_data --status: states of jobs and parts from outside, totals, and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import preprocess_data
from data_tools.preprocess.array import status_program
from data_tools.preprocess.array.parts import PartState, read_part
from data_tools.preprocess.array.progress import add_up, format_line
from data_tools.preprocess.job import status
from data_tools.preprocess.job.status import Amount, RateMeter, StatusWriter
from tests.data_tools.conftest import make_documents, write_jsonl
from tests.support.processes import ROOT
from tests.support.timeouts import PROCESS_TIMEOUT, wait_until

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "1"]


def status_of(capsys, *words: object) -> tuple[int, list[dict]]:
    capsys.readouterr()
    code = preprocess_data.main(["--status", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def live_job(tmp_path):
    """A job that has encoded a file and waits for standard input."""
    path = write_jsonl(tmp_path / "a.jsonl", make_documents(50, seed=1))
    command = [sys.executable, "-m", "data_tools.preprocess_data", "--input", str(path), "-"]
    process = subprocess.Popen(
        [*command, "--output-prefix", str(tmp_path / "o"), *BYTES],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    wait_until((tmp_path / "o.partial" / "status.json").exists)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PROCESS_TIMEOUT)


def test_running_suspended_and_killed_jobs(live_job, tmp_path, capsys, monkeypatch):
    prefix = tmp_path / "o"
    code, (job,) = status_of(capsys, prefix)
    assert (code, job["state"], job["states"]) == (0, "running", {"running": 1})
    part = job["parts"][0]
    assert f"process {live_job.pid} on" in part["why"]
    assert part["total_bytes"] == (tmp_path / "a.jsonl").stat().st_size
    assert 0 <= part["seconds_since_sign_of_life"] < 300

    hour = time.time() - 3600  # neither heartbeats nor a new status, but the process exists
    os.killpg(live_job.pid, signal.SIGSTOP)
    os.utime(prefix.with_name("o.partial") / ".run.json", (hour, hour))
    set_status(prefix, updated=hour)
    code, (job,) = status_of(capsys, prefix)
    assert (code, job["state"]) == (4, "stalled")

    os.killpg(live_job.pid, signal.SIGKILL)
    live_job.wait(PROCESS_TIMEOUT)
    code, (job,) = status_of(capsys, prefix)
    assert (code, job["state"]) == (1, "dead")
    assert "its process is gone; last sign of life 3,6" in job["parts"][0]["why"]


def set_status(prefix: Path, **values: object) -> None:
    path = prefix.with_name(f"{prefix.name}.partial") / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_job_on_another_machine_is_judged_by_its_last_sign_of_life(live_job, tmp_path, capsys):
    prefix, record = tmp_path / "o", tmp_path / "o.partial" / ".run.json"
    os.killpg(live_job.pid, signal.SIGSTOP)  # no more heartbeats
    owner = json.loads(record.read_text()) | {"host": "node7", "boot": "another", "pid": 4194300}
    record.write_text(json.dumps(owner))
    for age, state, code in ((60, "running", 0), (119, "running", 0), (125, "dead", 1)):
        then = time.time() - age
        os.utime(record, (then, then))
        set_status(prefix, updated=then)
        found, (job,) = status_of(capsys, prefix)
        assert (found, job["state"]) == (code, state)
    assert "process 4194300 on node7" in job["parts"][0]["why"]
    assert (
        "no heartbeat for 120 s from another machine, by the clocks of both"
        in (job["parts"][0]["why"])
    )


def test_complete_stopped_failed_and_absent_jobs(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", make_documents(50, seed=1))
    words = ["--input", str(path), *BYTES, "--output-prefix"]
    assert preprocess_data.main(["--status", str(tmp_path / "o")]) == 2
    assert "no job with this --output-prefix" in capsys.readouterr().err
    assert not list(tmp_path.glob("o*"))  # read-only

    assert preprocess_data.main([*words, str(tmp_path / "o")]) == 0
    code, (job,) = status_of(capsys, tmp_path / "o")
    assert (code, job["state"], job["share"]) == (0, "complete", 1.0)
    manifest = json.loads((tmp_path / "o_text_document.json").read_text())
    assert job["done"]["documents"] == manifest["documents"] == 50
    assert job["done"]["tokens"] == manifest["tokens"]
    assert job["done"]["disk"] == job["done"]["text"] == path.stat().st_size

    with monkeypatch.context() as patch:
        patch.setattr("data_tools.preprocess.job.job.PreprocessJob._encode_all", _interrupt)
        assert preprocess_data.main([*words, str(tmp_path / "p")]) == 130
    code, (job,) = status_of(capsys, tmp_path / "p")
    assert (code, job["state"]) == (3, "stopped")
    path.write_text('{"text": 1}\n')
    assert preprocess_data.main([*words, str(tmp_path / "q")]) == 2
    code, jobs = status_of(capsys, *(tmp_path / name for name in "opq"))
    assert (code, [job["state"] for job in jobs]) == (1, ["complete", "stopped", "failed"])
    assert f"{path}:1: not a string" in jobs[2]["parts"][0]["why"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_parts_of_an_array(tmp_path, monkeypatch, capsys):
    """Complete, dead and waiting parts; totals over all parts; one part; the merged array."""
    monkeypatch.setattr("data_tools.preprocess.array.shards.MIN_SPLIT_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", make_documents(300, seed=1))
    words = ["--input", str(path), *BYTES, "--output-prefix", str(tmp_path / "o")]
    assert preprocess_data.main([*words, "--shard", "0/3"]) == 0
    code, (job,) = status_of(capsys, tmp_path / "o")
    assert (code, job["states"]) == (3, {"complete": 1, "waiting": 2})
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("data_tools.preprocess.job.job.PreprocessJob._encode_all", _exit)
        preprocess_data.main([*words, "--shard", "2/3"])
    code, (job,) = status_of(capsys, tmp_path / "o")
    assert (code, job["count"], job["states"]) == (1, 3, {"complete": 1, "waiting": 1, "dead": 1})
    assert job["total_bytes"] == path.stat().st_size
    assert job["share"] == pytest.approx(1 / 3, abs=0.01)
    assert job["merged"] == f"not merged: merge_datasets --parts {tmp_path / 'o'}"
    code, (job,) = status_of(capsys, tmp_path / "o", "--shard", "1/3")
    assert (code, [part["state"] for part in job["parts"]]) == (3, ["waiting"])
    assert preprocess_data.main(["--status", str(tmp_path / "o"), "--shard", "1/4"]) == 2
    assert "There are arrays of 3 parts" in capsys.readouterr().err

    assert preprocess_data.main([*words, "--shard", "1/3", "--finish-array"]) == 0
    assert preprocess_data.main(["--status", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    for part in tmp_path.glob("o_part*"):
        part.unlink()
    code, (job,) = status_of(capsys, tmp_path / "o")
    assert (code, job["state"], job["done"]["documents"]) == (0, "complete", 300)
    assert "all 3 parts (3 complete): " in out and f"merged: {tmp_path / 'o'}_text_document" in out


def _exit(*_: object) -> None:
    raise SystemExit  # ends without recording why


def test_totals_and_one_line():
    mega, rate = Amount(6e6, 40e6, 1000, 5e6), Amount(1e6, 7e6, 200, 1e6)
    parts = [
        PartState(0, "complete", done=Amount(10e6, 60e6, 2000, 9e6), total=10_000_000),
        PartState(1, "running", done=mega, rates=rate, total=10_000_000, array_total=40_000_000),
        PartState(2, "running", done=mega, rates=rate, total=10_000_000, array_total=40_000_000),
        PartState(3, "waiting"),
    ]
    progress = add_up(parts)
    assert format_line(progress, 4) == (
        "all 4 parts (1 complete, 1 waiting, 2 running): 14.00 MB/s, 400 docs/s, 19.00M tokens so "
        "far, 55.0%, 00:00:09 left"
    )
    assert (progress.state, progress.seconds_left) == ("running", 9.0)
    assert format_line(add_up(parts[:1]), 1) == "complete: 9.00M tokens so far"


def test_rates_are_those_of_the_last_minute(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    meter = RateMeter()
    writer = StatusWriter(tmp_path, 100, 1, 0, (0, 0), meter)
    writer.begin(Amount(5000, 5000, 7, 5000))  # of an earlier start
    for second in range(1, 202):  # ten bytes per second, then one
        done = 5000 + (10.0 * second if second <= 100 else 1000.0 + (second - 100))
        now[0] += 1
        writer.update(Amount(done, done, 7 + second, done), 0, 0)
    assert writer.status.rates.disk == pytest.approx(1.0)
    assert writer.status.rates.documents == pytest.approx(1.0)
    stored = json.loads((tmp_path / "status.json").read_text())
    assert stored["stage"] == "encoding" and stored["done"]["disk"] >= 6095

    now[0] += 1  # the next part of the same process
    following = StatusWriter(tmp_path, 100, 1, 0, (0, 0), meter)
    following.begin(Amount())
    following.update(Amount(1, 1, 1, 1), 0, 0)
    assert following.status.rates.disk == pytest.approx(1.0)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "x"}', '{"done": {"disk": -1}}'])
def test_a_damaged_status_is_ignored(content, tmp_path):
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "status.json").write_text(content)
    assert read_part(str(tmp_path / "o"), 0).state == "waiting"


def test_help_and_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        preprocess_data.main(["--status", "--help"])
    assert "States and exit codes" in capsys.readouterr().out
    for words in ([], [str(tmp_path), "--watch", "0"], [str(tmp_path), "--watch", "9", "--json"]):
        assert preprocess_data.main(["--status", *words]) == 2
        assert ": expected " in capsys.readouterr().err


def test_watching_until_nothing_runs(tmp_path, monkeypatch, capsys):
    states = [PartState(0, "running"), PartState(0, "running"), PartState(0, "complete")]
    monkeypatch.setattr(status_program, "read_part", lambda *_: states.pop(0))
    args = status_program.status_parser().parse(["--status", str(tmp_path / "o"), "--watch", "7"])
    waited: list[float] = []
    assert status_program.show_status(args, waited.append) == 0
    assert waited == [7, 7] and len(capsys.readouterr().out.splitlines()) == 3
