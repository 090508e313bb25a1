"""``--follow``: each new checkpoint of a run is converted, and a command called with it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_llmjp.convert.follow import command as commands
from megatron_llmjp.convert.follow import held_checkpoint
from megatron_llmjp.convert.follow.command import RunningCommand
from megatron_llmjp.convert.follow.follow import FollowSettings, follow, run_is_finished
from megatron_llmjp.convert.follow.journal import JOURNAL, CheckpointId, Journal
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import llama, state
from tests.convert.test_average import rename_iteration
from tests.support.forks import Fork
from tests.support.timeouts import wait_until

START = '{"iteration": 0, "event": "start"}\n'
DONE = '{"iteration": 30, "event": "end", "outcome": "done", "why": ""}\n'
STOPPED = '{"iteration": 30, "event": "end", "outcome": "stopped", "why": ""}\n'


@pytest.fixture
def run(tmp_path, convert):
    """Write a run with the checkpoints 10 and 20; ``run.add`` adds others."""
    llama().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "start")
    return Run(tmp_path)


class Run:
    def __init__(self, root):
        self.root, self.save = root, root / "run"
        self.save.mkdir()
        (self.save / "metrics.jsonl").write_text(START)
        self.add(10)
        self.add(20)

    def add(self, iteration):
        temporary = self.root / "new"
        shutil.copytree(self.root / "start" / "iter_0000000", temporary)
        return rename_iteration(temporary, self.save, iteration)

    def finish(self, line=DONE):
        (self.save / "metrics.jsonl").write_text(START + line)

    def words(self, *more):
        return ["--follow", self.save, "--to", "hf", "--output", self.root / "out",
                "--poll-seconds", 0.01, *more]  # fmt: skip


def records(folder, event):
    lines = (folder / JOURNAL).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [record["iteration"] for record in found if record.get("event") == event]


def test_a_finished_run_is_converted_once(run, convert):
    run.finish()
    log = run.root / "log"
    command = f'echo "$ITERATION $(ls $CHECKPOINT | grep -cx config.json)" >> {log}'
    convert(*run.words("--command", command))
    out = run.root / "out"
    assert state(out / "iter_0000010").keys() == state(run.root / "hf").keys()
    assert log.read_text() == "10 1\n20 1\n"
    assert sorted(p.name for p in out.iterdir()) == [JOURNAL, "iter_0000010", "iter_0000020"]
    run.add(30)
    shutil.rmtree(out / "iter_0000010")  # not needed any more
    convert(*run.words("--command", command))
    assert log.read_text() == "10 1\n20 1\n30 1\n"
    assert records(out, "converted") == records(out, "command") == [10, 20, 30]


def test_a_running_run_is_followed_until_it_is_finished(run):
    """A new process: it waits, converts what appears, and ends by itself."""
    process = Fork(call_main, [str(word) for word in run.words()])
    try:
        out = run.root / "out"
        process.until(lambda: (out / "iter_0000020").exists())
        run.finish(STOPPED)
        run.add(40)
        process.until(lambda: (out / "iter_0000040").exists())
        run.add(50)
        run.finish()
        assert process.wait() == 0
        assert (out / "iter_0000050").exists()
    finally:
        process.kill_all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_command_and_the_next_start_repeats_it(run, convert, number):
    """The command and its children end; the conversion is not repeated."""
    pid = run.root / "pid"
    command = f"sleep 1000 & echo $! > {pid}.tmp; mv {pid}.tmp {pid}; wait"
    process = Fork(call_main, [str(word) for word in run.words("--command", command)])
    try:
        process.until(pid.exists)
        process.send_signal(number)
        assert process.wait() == 130, process.stderr
        assert "the same command continues" in process.stdout
        child = int(pid.read_text())
        wait_until(lambda: not alive(child))
    finally:
        process.kill_all()
    run.finish()
    convert(*run.words("--command", f"echo $ITERATION >> {run.root / 'log'}"))
    assert (run.root / "log").read_text() == "10\n20\n"
    assert records(run.root / "out", "converted") == [10, 20]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_command_starts(run, number):
    """The signal arrives when the shell runs and before its process is stored."""
    pid = run.root / "pid"
    command = f"echo $$ > {pid}.tmp; mv {pid}.tmp {pid}; sleep 1000"
    words = [str(word) for word in run.words("--command", command)]
    process = Fork(call_main_and_interrupt_the_start, words, str(pid), int(number))
    try:
        assert process.wait() == 130, process.stderr
        assert not alive(int(pid.read_text()))
    finally:
        process.kill_all()


def call_main_and_interrupt_the_start(words, pid, number):
    from megatron_llmjp.convert.follow import command

    class InterruptedStart(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            wait_until(Path(pid).exists)
            signal.raise_signal(number)

    command.subprocess.Popen = InterruptedStart
    call_main(words)


def test_children_have_time_to_end(tmp_path):
    """A shell ends at SIGTERM at once; its child may save something before it ends."""
    code = (
        "import signal, sys, time; from pathlib import Path; begin, end = map(Path, sys.argv[1:]);"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), end.touch(), sys.exit()));"
        "begin.touch(); time.sleep(1000)"
    )
    begin, end = tmp_path / "begin", tmp_path / "end"
    running = RunningCommand(
        f"'{sys.executable}' -c '{code}' {begin} {end}; true", CheckpointId(10, "a"), tmp_path
    )
    wait_until(begin.exists)
    running.stop()
    assert end.exists()


def test_children_that_ignore_sigterm_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "STOP_SECONDS", 0.1)
    pid = tmp_path / "pid"
    script = tmp_path / "ignoring.sh"
    script.write_text(
        f"trap : TERM; echo $$ > {pid}.tmp; mv {pid}.tmp {pid}; while :; do sleep 1; done"
    )
    running = RunningCommand(f"sh {script} & wait", CheckpointId(10, "a"), tmp_path)
    wait_until(pid.exists)
    running.stop()
    wait_until(lambda: not alive(int(pid.read_text())))


def call_main(words):
    from megatron_llmjp.convert.cli import main

    raise SystemExit(main(words))


def alive(pid):
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        return text.rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_failed_command_is_reported_and_does_not_stop(run, convert):
    run.finish()
    log = run.root / "log"
    command = f"echo $ITERATION >> {log}; test $ITERATION != 10"
    text = convert(*run.words("--command", command), code=1)
    assert "iter_0000010: the command failed: exit code 1" in text
    assert log.read_text() == "10\n20\n"
    log.unlink()
    text = convert(*run.words("--command", command, "--stop-on-error"), code=1)
    assert log.read_text() == "10\n"  # only the failed one is repeated
    convert(*run.words("--command", "true"))
    convert(*run.words("--command", "false"))  # all are done


def test_stop_on_error_ends_at_the_first(run, convert):
    command = f"echo $ITERATION >> {run.root / 'log'}; false"
    convert(*run.words("--command", command, "--stop-on-error"), code=1)
    assert (run.root / "log").read_text() == "10\n"


@pytest.mark.parametrize("can_link", [True, False])
def test_retention_may_remove_a_checkpoint_meanwhile(run, monkeypatch, capsys, can_link):
    """With links the conversion sees all files; without, the checkpoint is skipped."""
    run.finish()
    if not can_link:

        def refuse(*_):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(held_checkpoint.os, "link", refuse)
    converted = []

    def convert(source, output):
        if source.name == "iter_0000010":
            shutil.rmtree(run.save / "iter_0000010")
        if not (source / "manifest.json").exists():
            raise UserError("missing")
        assert (source / "config.yaml").read_text()
        output.mkdir()
        converted.append(source.name)

    settings = FollowSettings(run.save, run.root / "out", "hf", poll_seconds=0.01)
    assert follow(settings, convert) == 0
    expected = ["iter_0000010", "iter_0000020"] if can_link else ["iter_0000020"]
    assert converted == expected
    printed = capsys.readouterr().out
    assert ("iter_0000010 was removed before it was converted" in printed) != can_link
    assert not (run.root / "out" / held_checkpoint.FOLDER).exists()


def test_a_checkpoint_that_is_saved_again_replaces_its_output(run, convert):
    """After a rollback, the run saves other weights at the same iteration."""
    run.finish()
    convert(*run.words("--command", f"echo $ITERATION >> {run.root / 'log'}"))
    (run.root / "out" / "iter_0000020" / "of the first output").touch()
    shutil.rmtree(run.save / "iter_0000020")
    folder = run.root / "start" / "iter_0000000" / "manifest.json"
    content = json.loads(folder.read_text())
    folder.write_text(json.dumps({**content, "checksum": None, "metrics": {"lm loss": 1.5}}))
    run.add(20)
    text = convert(*run.words("--command", f"echo $ITERATION >> {run.root / 'log'}"))
    assert "was saved again" in text
    assert not (run.root / "out" / "iter_0000020" / "of the first output").exists()
    assert (run.root / "log").read_text() == "10\n20\n20\n"


def test_a_damaged_checkpoint_does_not_stop_the_next(run, convert):
    run.finish()
    (run.save / "iter_0000010" / "config.yaml").write_text("damaged")
    text = convert(*run.words(), code=1)
    assert "iter_0000010: the conversion failed" in text
    assert [p.name for p in (run.root / "out").glob("iter_*")] == ["iter_0000020"]


def test_the_journal_of_a_killed_process(tmp_path):
    first, again = CheckpointId(10, "a"), CheckpointId(10, "b")
    journal = Journal(tmp_path, tmp_path / "run", "hf")
    journal.begin(first)
    journal.convert(first, 1.0)
    journal.command(first, 1, 1.0)
    with (tmp_path / JOURNAL).open("a") as stream:
        stream.write('{"event": "command", "iter')
    journal = Journal(tmp_path, tmp_path / "run", "hf")
    assert journal.is_converted(first) and not journal.is_converted(again)
    assert not journal.is_commanded(first)
    journal.command(first, 0, 1.0)
    assert Journal(tmp_path, tmp_path / "run", "hf").is_commanded(first)
    with pytest.raises(UserError, match="give another --output"):
        Journal(tmp_path, tmp_path / "other", "hf")


def test_a_run_is_finished_when_it_has_released_its_folder(tmp_path):
    assert not run_is_finished(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    for text, expected in (
        (START, False),
        (START + STOPPED, False),
        (START + DONE, True),
        (START + DONE + START, False),
        (START + DONE + '{"iteration": 30, "lm loss": 2.0}\n{"itera', True),
    ):
        metrics.write_text(text)
        assert run_is_finished(tmp_path) == expected, text
    (tmp_path / ".run.json").write_text("{}")  # its process still saves
    assert not run_is_finished(tmp_path)


def test_errors(run, convert, tmp_path):
    def refused(*words):
        return convert("--to", "hf", "--output", tmp_path / "o", *words, code=2)

    assert "does not exist" in refused("--follow", tmp_path / "no")
    assert "is a Hugging Face model" in refused("--follow", tmp_path / "hf")
    assert "--input cannot be combined" in refused("--follow", run.save, "--input", run.save)
    assert "--command requires --follow" in refused("--input", run.save, "--command", "true")
    assert "the followed folder" in convert(
        "--to", "hf", "--follow", run.save, "--output", run.save, code=2
    )
    (tmp_path / "out").mkdir()
    run.finish()
    holder = Fork(hold_lock, str(tmp_path / "out"))
    try:
        holder.until((tmp_path / "out" / "held").exists)
        assert "in use by another" in convert(*run.words(), code=2)
    finally:
        holder.kill_all()


def hold_lock(folder):
    from megatron_llmjp.convert.follow.follow import LOCK
    from megatron_llmjp.filesystem import acquire_lock

    acquire_lock(Path(folder) / LOCK)
    (Path(folder) / "held").touch()
    time.sleep(1000)
