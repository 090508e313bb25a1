"""run_status for a real run that runs, is killed, hangs, fails, is requeued and finishes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_tools.run_status import main
from megatron_llmjp.checkpoint.run_lock import RECORD
from megatron_llmjp.report.jobs import REQUEUE_LOG, first_error
from megatron_llmjp.report.status import RunStatus, read_status
from megatron_llmjp.report.status_table import format_status
from slurm.requeue import HISTORY
from tests.support.datasets import write_folds
from tests.support.forks import ROOT, Fork, be_program
from tests.support.training import arguments

ITERATIONS = 3000


def files(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, RunStatus]:
    """Return the folder of a killed run, and its status before the kill."""
    folder = tmp_path_factory.mktemp("run")
    folds = write_folds(folder, (ITERATIONS // 2, ITERATIONS // 2), repeat=True)
    save = folder / "save"
    words = arguments("laptop-llama", folds, "--save", save, "--save-interval", 2)
    process = Fork(be_program, [str(ROOT / "pretrain_gpt.py"), *words])
    assert process.until((save / "iter_0000002" / "manifest.json").exists), process.stderr
    alive = read_status(save)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return save, alive


@pytest.fixture
def save(killed, tmp_path) -> Path:
    return Path(shutil.copytree(killed[0], tmp_path / "save"))


def ended(save: Path, **last: Any) -> None:
    """Make the run one that gave its folder back, with other values in its last line."""
    (save / RECORD).unlink(missing_ok=True)
    metrics = save / "metrics.jsonl"
    steps = [r for r in map(json.loads, metrics.read_text().splitlines()) if "lm loss" in r]
    with metrics.open("a") as stream:
        stream.write(json.dumps({**steps[-1], **last}) + "\n")


def test_a_running_run(killed):
    _, status = killed
    assert status.state == "running" and f"process {os.getpid()}" not in status.why
    assert status.iteration >= 1 and status.train_iters == ITERATIONS
    assert (status.fold, status.fold_number, status.folds) == ("fold00", 1, 2)
    assert status.fold_progress == pytest.approx(status.iteration / (ITERATIONS // 2))
    assert status.consumed_tokens == status.iteration * 4 * 32
    assert status.saved is not None and status.saved.iterations[0] == 2 and status.saved.bytes > 0
    assert status.loss and status.tokens_per_second and status.seconds_remaining
    text = format_status(status)
    for words in (f"of {ITERATIONS:,} (0.", "fold00 (1 of 2), 0% done", "tokens/s", "the newest"):
        assert words in text, words


def test_a_killed_run(save, capsys):
    """Its last line may be incomplete; run_status changes no file."""
    with (save / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 17, "lm lo')
    before = files(save)
    assert main([str(save)]) == 1
    output = capsys.readouterr().out
    assert "dead: process" in output and "was killed, or its machine is down" in output
    assert files(save) == before


def test_ends(save):
    ended(save)
    assert read_status(save).state == "stopped"
    last = {"consumed samples": 4 * ITERATIONS, "seconds remaining": 0.0}
    ended(save, iteration=ITERATIONS, **last)
    status = read_status(save)
    assert status.state == "finished" and status.iteration == status.train_iters == ITERATIONS
    ended(save, **{"lm loss": float("nan")})
    assert "loss         nan" in format_status(read_status(save))


def test_how_the_process_ended(save):
    """What it wrote itself counts for more than the iteration that it came to."""
    place = {"iteration": ITERATIONS, "consumed samples": 4 * ITERATIONS}
    counts = {"total skipped iterations": 12, "total nan iterations": 9, "rollbacks": 2}
    ended(save, **place, **counts, **{"lm loss": None, "seconds remaining": 0.0})
    for outcome, state in (("failed", "failed"), ("stopped", "stopped"), ("done", "finished")):
        with (save / "metrics.jsonl").open("a") as stream:
            record = {**place, "event": "end", "outcome": outcome, "why": "too many bad steps"}
            stream.write(json.dumps(record) + "\n")
        assert read_status(save).state == state
        assert (read_status(save).why == "too many bad steps") == (state != "finished")
    text = format_status(read_status(save))
    assert "not applied  12 steps so far; 9 with a NaN or Inf, 2 rollbacks" in text


def test_a_growing_batch(save):
    """At iteration 10, 80 samples are left: 20 iterations of 2, and 10 of 4."""
    for config in save.glob("iter_*/config.yaml"):
        text = config.read_text()
        assert "rampup_batch_size: null" in text
        config.write_text(text.replace("rampup_batch_size: null", "rampup_batch_size: [2, 2, 60]"))
    values = {"seconds per iteration": 1.0, "global batch size": 2, "consumed samples": 20}
    ended(save, iteration=10, **values, **{"seconds remaining": 40.0})
    assert read_status(save).train_iters == 40


def test_the_length_of_a_run_without_a_checkpoint(tmp_path):
    """The iterations so far, and the remaining time in iterations."""
    values = {"lm loss": 1.0, "seconds remaining": 41.0, "seconds per iteration": 2.0}
    record = {"iteration": 10, "consumed samples": 40, "consumed tokens": 1280, **values}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert read_status(tmp_path).train_iters == 10 + 20
    text = format_status(read_status(tmp_path))
    assert "10 of 30 (33.3%)" in text and "remaining    00:00:41" in text


def test_job_files(save, capsys):
    ended(save)
    assert REQUEUE_LOG == HISTORY
    why = "stopped on request; requeued, since there is a new checkpoint"
    record = {"time": "2025-01-02 03:04:05", "job": "8", "restart": 0}
    record |= {"exit code": 3, "iteration": 2, "requeued": True}
    (save / REQUEUE_LOG).write_text(json.dumps({**record, "why": why}) + '\n{"time": ')
    logs = {
        "job7_0/rank_0001.log": (100, "error: an older job's\n"),
        "job8_0/rank_0000.log": (
            30,
            "steps\nerror: rank 0 of 4:\nTraceback (most recent\n"
            '  File "a"\nRuntimeError: closed by peer\n',
        ),
        "job8_0/rank_0003.log": (20, "error: no room on /data\n  a hint\n"),
        "job8_0/rank_0002.log": (10, "all is well\n"),
    }
    for name, (when, text) in logs.items():
        log = save / "logs" / name
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text)
        os.utime(log, (when, when))
    os.utime(save / "logs" / "job7_0", (100, 100))
    (save / "hang").mkdir()
    hang = "error: no progress for 8 minutes at iteration 2\nrank 3: no response\nrank 0: waits\n"
    (save / "hang" / "report.txt").write_text(hang)
    assert main([str(save)]) == 0
    output = capsys.readouterr().out
    for words in (
        f"requeued: waiting in the queue: {why}",
        f"1, the last on 2025-01-02 03:04:05 with exit code 3 at iteration 2: {why}",
        "no room on /data (logs/job8_0/rank_0003.log)",
        "no progress for 8 minutes at iteration 2; rank 3: no response (hang/report.txt)",
    ):
        assert words in output, words
    assert main([str(save), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["error"]["what"] == "no room on /data" and found["ends"][0]["exit code"] == 3


def test_errors_in_logs():
    traceback = ["error: rank 0 of 4:", "Traceback (most recent call last):", '  File "a"', "E: b"]
    assert first_error(["x", *traceback, "", "During handling"]) == "rank 0 of 4: E: b"
    assert first_error(["error: one line", "  more"]) == "one line"
    assert first_error(traceback[:2]) == "rank 0 of 4: "
    assert first_error(["no error: here"]) is None


def test_watch(save, capsys):
    """Each refresh reads the run again; Ctrl-C ends the program without a message."""
    seen = []

    def sleep(seconds):
        seen.append(capsys.readouterr())
        if len(seen) == 2:
            raise KeyboardInterrupt
        ended(save)

    assert main([str(save), "--watch", "0.5"], sleep) == 3
    assert [" dead: " in text.out for text in seen] == [True, False]
    assert " stopped: " in seen[1].out and not any(text.err for text in seen)
    seen.clear()
    assert main([str(save / "no"), "--watch", "5"], sleep) == 2
    assert [text.err.count("does not exist") for text in seen] == [1, 1]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_watch_without_a_period(seconds, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), f"--watch={seconds}"])
    assert f"{seconds}: expected a number of seconds above 0" in capsys.readouterr().err


def test_several(save, tmp_path, capsys):
    ended(save)
    other = tmp_path / "日本語"
    other.mkdir()
    assert main([str(save), str(save), str(other)]) == 2
    captured = capsys.readouterr()
    assert [line.split()[:2] for line in captured.out.splitlines()[1:]] == [["save", "stopped"]] * 2
    assert "日本語 is not the save folder of a run" in captured.err


@pytest.mark.parametrize(
    ("name", "words"), [("empty", "not the save folder"), ("no", "does not exist")]
)
def test_folders_without_a_run(name, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err


def test_a_run_that_is_just_starting(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    status = read_status(tmp_path)
    assert (status.state, status.iteration, status.loss) == ("stopped", 0, None)
    assert "none yet" in format_status(status)


def test_without_torch(killed):
    """As on a login node."""
    code = "import sys; from data_tools.run_status import main; main(sys.argv[1:]); "
    code += "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'"
    done = subprocess.run([sys.executable, "-c", code, str(killed[0])], cwd=ROOT)
    assert done.returncode == 0
