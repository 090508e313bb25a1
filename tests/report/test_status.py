"""State and exit code of runs whose save folders and queue are written out; work done per run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from data_tools.run_status import main
from megatron_llmjp.checkpoint import run_lock
from megatron_llmjp.checkpoint.run_lock import RECORD
from megatron_llmjp.report.run_state import EXIT_CODES, worst_exit_code
from megatron_llmjp.report.status import read_status
from megatron_llmjp.report.status_table import format_status

STEP = {
    "iteration": 10,
    "consumed samples": 40,
    "consumed tokens": 1280,
    "lm loss": 2.5,
    "seconds per iteration": 1.0,
    "seconds remaining": 90.0,
}
RAN = "8 process(es) by srun on cpu: TP 1 x PP 1 x DP 8\n"
OWNER = {"host": "other", "boot": "b", "pid": 1, "started": "yesterday", "token": "t"}


class SaveFolder:
    """A save folder with the files that a test gives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.time = 1_000_000_000
        path.mkdir()

    def metrics(self, *records: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.writelines(json.dumps({**STEP, **record}) + "\n" for record in records)

    def event(self, kind: str, **strings: str) -> None:
        record = {"iteration": 10, "event": kind, **strings}
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def job(self, name: str, **logs: str) -> Path:
        """Add the logs of a job that is newer than all others."""
        folder = self.path / "logs" / f"job{name}"
        (folder / "preflight").mkdir(parents=True)
        for log, text in logs.items():
            (folder / f"{log}.log").write_text(text)
        self.time += 100
        os.utime(folder, (self.time, self.time))
        return folder

    def preflight(self, name: str, *common: str, **unfit: list[str]) -> None:
        report = {"fit": False, "common": common, "unfit": unfit}
        (self.job(name) / "preflight" / "report.json").write_text(json.dumps(report))

    def end(self, name: str, code: int, requeued: bool, why: str, **other: Any) -> None:
        job, _, restart = name.partition("_")
        record = {"job": job, "restart": int(restart), "exit code": code, "iteration": 10}
        with (self.path / "requeues.jsonl").open("a") as stream:
            stream.write(json.dumps({**record, "requeued": requeued, "why": why, **other}) + "\n")

    def owner(self, started: float) -> None:
        text = time.strftime(run_lock.TIME_FORMAT, time.gmtime(started))
        (self.path / RECORD).write_text(json.dumps({**OWNER, "started": text}))

    def dead_owner(self) -> None:
        (self.path / RECORD).write_text(json.dumps(OWNER))
        os.utime(self.path / RECORD, (self.time, self.time))

    def status(self) -> tuple[str, str]:
        found = read_status(self.path)
        return found.state, found.why


@pytest.fixture
def run(tmp_path: Path) -> SaveFolder:
    return SaveFolder(tmp_path / "run")


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch):
    """Return a function that replaces Slurm's answer; without a call there is no Slurm."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def answer(*lines: str, code: int = 0, error: str = "") -> Path:
        text = "".join(f"echo '{line}'\n" for line in lines)
        (programs / "squeue").write_text(
            f'#!/bin/sh\necho "$@" >> {programs}/calls\n{text}echo "{error}" >&2\nexit {code}\n'
        )
        (programs / "squeue").chmod(0o755)
        return programs / "calls"

    return answer


def test_a_job_that_slurm_requeued_without_the_script(run, squeue):
    """Preemption and ``scontrol requeuehold`` end the job script before it records the end."""
    run.metrics({})
    run.job("7_0", rank_0000=RAN)
    run.dead_owner()
    assert run.status()[0] == "dead"
    calls = squeue("7|PENDING|Priority")
    assert run.status() == ("requeued", "waiting in Slurm's queue (Priority)")
    assert "--jobs=7,7" in calls.read_text()
    for line in ("7|PENDING|job requeued in held state", "7|PENDING|JobHeldUser"):
        squeue(line)
        state, why = run.status()
        assert state == "held" and "scontrol release 7" in why
    squeue("7|REQUEUE_HOLD|None")
    assert run.status()[0] == "held"
    squeue("7|SUSPENDED|None")
    assert run.status() == ("suspended", "Slurm has suspended job 7")
    squeue("7|RUNNING|None")  # it is about to be requeued, or not
    assert run.status()[0] == "dead"
    squeue(code=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    assert run.status()[0] == "dead"


def test_a_job_in_its_preflight(run, squeue):
    run.metrics({})
    run.event("end", outcome="stopped", why="signal received")
    run.job("7_0", rank_0000=RAN)
    run.job("7_1", rank_0000="")
    assert run.status() == ("stopped", "signal received")
    squeue("7|RUNNING|None")
    assert run.status() == ("starting", "job 7 has not opened the save folder yet")
    run.job("7_2", rank_0000="a warning\n")  # imports and rendezvous take minutes
    assert run.status()[0] == "starting"
    (run.path / "logs" / "job7_2" / "rank_0000.log").write_text(RAN)
    assert run.status()[0] == "stopped"


def test_a_start_without_logs(run, squeue):
    """Between Slurm's start of a job and its first log, the nodes may be configured."""
    run.metrics({})
    run.event("end", outcome="stopped", why="signal received")
    run.job("7_0", rank_0000=RAN)
    for minutes, state in ((-5, "stopped"), (5, "starting")):
        start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(run.time + 60 * minutes))
        squeue(f"7|RUNNING|None|{start}")
        assert run.status()[0] == state
    squeue("7|RUNNING|None|N/A")
    assert run.status()[0] == "stopped"


def test_a_starting_job_without_slurm(run, squeue):
    """Under PBS, or on a machine without squeue, its logs say that it has just started."""
    run.metrics({})
    run.event("end", outcome="stopped", why="signal received")
    run.time = int(time.time()) - 400
    folder = run.job("7_0", rank_0000="")
    assert run.status()[0] == "starting"
    os.utime(folder, (run.time - 1000, run.time - 1000))
    assert run.status()[0] == "stopped"


def test_a_restart_is_not_stalled(run, squeue, monkeypatch):
    """The last line may be hours old when a process has just taken over."""
    monkeypatch.setattr(run_lock, "is_owner_alive", lambda *_: True)
    run.metrics({"iteration": 800}, {"iteration": 900}, {"iteration": 1000})
    metrics, now = run.path / "metrics.jsonl", time.time()
    os.utime(metrics, (now - 10_000, now - 10_000))
    run.owner(started=now - 300)
    assert run.status()[0] == "starting"
    run.owner(started=now - 20_000)
    assert run.status()[0] == "stalled"
    run.event("start")
    # The line after the first step says nothing about the interval, which is 100 steps.
    run.metrics({"iteration": 1001})
    for seconds, state in ((900, "running"), (1100, "stalled")):
        os.utime(metrics, (now - seconds, now - seconds))
        assert run.status()[0] == state


def test_a_new_run_is_not_stalled(run, squeue, monkeypatch):
    """After its first step, nobody knows when the next line is due."""
    monkeypatch.setattr(run_lock, "is_owner_alive", lambda *_: True)
    run.event("start")
    run.metrics({"iteration": 1})
    now = time.time()
    run.owner(started=now - 20_000)
    for seconds, state in ((3000, "running"), (4000, "stalled")):
        os.utime(run.path / "metrics.jsonl", (now - seconds, now - seconds))
        assert run.status()[0] == state


def test_a_run_that_its_stop_file_ended(run, squeue):
    """The job script does not know why its ranks ended with exit code 0."""
    run.metrics({})
    run.event("end", outcome="stopped", why="file 'stop' found")
    run.job("7_0", rank_0000=RAN)
    run.end("7_0", 0, False, "the run is finished, or was stopped")
    assert run.status() == ("stopped", "file 'stop' found")


def test_a_failed_preflight(run, squeue):
    run.metrics({})
    run.event("end", outcome="stopped", why="signal received")
    run.preflight("8_0", n0=["1 of 2 GPUs", "GPU 0: 3 uncorrected ECC errors"], n4=["no response"])
    assert run.status() == (
        "failed",
        "the preflight of job 8 failed: n0: 1 of 2 GPUs, GPU 0: 3 uncorrected ECC errors; "
        "n4: no response",
    )
    squeue("8|PENDING|BeginTime")
    assert run.status()[0] == "requeued"
    run.job("9_0", rank_0000=RAN)  # a later job passed
    squeue()
    assert run.status()[0] == "stopped"


def test_a_common_cause_of_a_failed_preflight(run):
    run.preflight("8_0", "no node answered")
    assert run.status() == ("failed", "the preflight of job 8 failed: no node answered")
    run.preflight("9_0")
    assert run.status()[0] != "failed"


def test_many_nodes_that_failed_the_preflight(run):
    run.preflight("8_0", **{f"n{i}": ["no disk"] for i in range(64)})
    assert run.status()[1].endswith("n3: no disk; 60 more")


def test_recorded_ends_of_jobs(run, squeue):
    """Without Slurm the record is believed; with Slurm, only while the job is in the queue."""
    run.metrics({})
    run.event("end", outcome="failed", why="too many bad steps")
    run.job("7_0", rank_0000=RAN)
    run.end("7_0", 1, True, "failed; requeued: there is a new checkpoint")
    assert run.status()[0] == "requeued"
    calls = squeue("7|PENDING|BeginTime")
    assert run.status()[1].startswith("waiting in Slurm's queue (BeginTime): failed; requeued")
    squeue(code=1, error="slurm_load_jobs error: Invalid job id specified")
    state, why = run.status()
    assert state == "stopped" and why.startswith("job 7 has left Slurm's queue")
    run.job("7_1", rank_0000=RAN)
    run.end("7_1", 1, False, "not requeued: no new checkpoint in 3 starts", cause="no room")
    run.dead_owner()
    assert run.status() == ("failed", "not requeued: no new checkpoint in 3 starts: no room")
    assert calls.read_text().count("\n") == 3


def test_a_rejected_job_is_not_the_finished_run(run):
    run.metrics({"iteration": 100, "seconds remaining": 0.0})
    run.event("end", outcome="done", why="all iterations are done")
    run.job("7_0", rank_0000=RAN, rank_0001="error: an old one, survived\n")
    run.end("7_0", 0, False, "the run is finished")
    run.job("8_0", rank_0000="error: --save X is in use by another run (process 1)\n")
    run.end("8_0", 2, False, "an error in the arguments or the data is not fixed by a requeue")
    run.job("9_0", rank_0000="error: --lr -1: expected more\n")
    run.end("9_0", 2, False, "an error in the arguments or the data is not fixed by a requeue")
    found = read_status(run.path)
    assert found.state == "finished"
    assert found.error is not None and found.error.what == "an old one, survived"
    assert found.rejected is not None and found.rejected.where == "logs/job9_0/rank_0000.log"
    assert "rejected job" in format_status(found)


def test_a_rejected_job_while_the_run_is_requeued(run):
    run.metrics({})
    run.end("7_0", 3, True, "stopped on request; requeued: there is a new checkpoint")
    run.end("8_0", 2, False, "an error in the arguments or the data is not fixed by a requeue")
    assert run.status()[0] == "requeued"
    run.end("7_1", 2, False, "an error in the arguments or the data is not fixed by a requeue")
    assert run.status()[0] == "failed"


def test_a_rejected_job_is_not_the_run_in_the_queue(run, squeue):
    """Neither of a run that is requeued, nor of one that Slurm requeued without a record."""
    rejection = "an error in the arguments or the data is not fixed by a requeue"
    run.metrics({})
    run.dead_owner()
    run.job("7_0", rank_0000=RAN)
    run.job("8_0")
    run.end("8_0", 2, False, rejection, cause="--lr -1: expected more")
    squeue("7|PENDING|Priority")
    assert run.status()[0] == "requeued"
    squeue("7|PENDING|JobHeldUser", "8|RUNNING|None")  # it is about to end
    assert run.status()[0] == "held"
    run.job("7_1", rank_0000="")
    squeue("7|RUNNING|None")
    assert run.status()[0] == "starting"
    run.end("7_1", 3, True, "stopped on request; requeued: there is a new checkpoint")
    run.job("9_0")
    run.end("9_0", 2, False, rejection, cause="--lr -1: expected more")
    squeue("7|PENDING|Priority")
    assert run.status()[0] == "requeued"
    squeue()  # somebody cancelled it
    assert run.status()[0] == "stopped"


def test_a_job_that_the_running_one_rejected(run, squeue):
    """Without Slurm: the run was killed later, and its end is not recorded."""
    run.metrics({})
    run.dead_owner()
    run.job("7_0", rank_0000=RAN)
    run.job("8_0")
    run.end("8_0", 2, False, "an error", cause=f"--save X {run_lock.IN_USE} (process 1)")
    assert run.status()[0] == "dead"


def test_a_successor_under_pbs(run, squeue):
    """Each start has another job id: its error is the run's."""
    run.metrics({})
    run.end("7.server_0", 3, True, "stopped on request; requeued: there is a new checkpoint")
    assert run.status()[0] == "requeued"
    run.end("8.server_0", 2, False, "an error in the arguments or the data")
    assert run.status()[0] == "failed"


def test_a_user_error_after_training_is_the_runs(run):
    """Damaged data has the exit code of a user error too."""
    run.metrics({})
    run.job("7_0", rank_0000=f"{RAN}error: data/ja.bin: token 70000 is out of range\n")
    run.end("7_0", 2, False, "an error in the arguments or the data is not fixed by a requeue")
    found = read_status(run.path)
    assert found.state == "failed" and found.rejected is None
    assert found.error is not None and "token 70000" in found.error.what


def test_excluded_nodes(run):
    run.metrics({})
    nodes = [{"node": "n3", "reason": "rank 17 was silent"}, {"node": "n9"}, "damaged"]
    run.end("7_0", 1, True, "failed", excluded=[{"node": "n3", "reason": "slow"}])
    run.end("7_1", 1, True, "failed", excluded=nodes, cause="no progress for 8 minutes")
    found = read_status(run.path)
    assert found.excluded == {"n3": "rank 17 was silent", "n9": ""}
    assert "excluded     n3: rank 17 was silent; n9: unknown" in format_status(found)


def test_a_recorded_cause_needs_no_logs(run):
    run.metrics({})
    run.job("7_0", rank_0000=RAN, rank_0003="error: a consequence\n")
    run.end("7_0", 1, True, "failed", cause="disk full on n7")
    error = read_status(run.path).error
    assert error is not None and (error.what, error.where) == ("disk full on n7", "logs/job7_0")


def test_exit_codes(tmp_path, capsys):
    assert [worst_exit_code(states) for states in (["running"], ["stopped", "running"])] == [0, 3]
    assert worst_exit_code(["stopped", "stalled", "finished"]) == 4
    assert worst_exit_code(["stalled", "dead", "held"]) == 1
    healthy = {state for state, code in EXIT_CODES.items() if code == 0}
    assert healthy == {"running", "starting", "requeued", "finished"}
    folders = []
    for name, outcome in (("a", "done"), ("b", "stopped"), ("c", "failed")):
        folder = SaveFolder(tmp_path / name)
        folder.metrics({"iteration": 100, "seconds remaining": 0.0})
        folder.event("end", outcome=outcome, why="the reason")
        folders.append(str(folder.path))
    assert [main(folders[:number]) for number in (1, 2, 3)] == [0, 3, 1]
    assert main([*folders, str(tmp_path / "none")]) == 2
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[:2] for line in table] == [["a", "finished"], ["b", "stopped"],
                                                    ["c", "failed"]]  # fmt: skip
    assert not table[0].endswith("reason") and table[2].endswith("the reason")


def bytes_read() -> int:
    counts = Path("/proc/self/io").read_text().split()
    return int(counts[counts.index("rchar:") + 1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts no I/O")
def test_the_work_for_a_run_does_not_grow_with_its_age(run, squeue):
    """Months of a run on 512 GPUs are read as quickly as its first day."""
    run.metrics(*[{"iteration": number} for number in range(20_000)])
    for number in range(3_000):
        run.end(f"7_{number}", 3, True, "stopped on request " + 200 * "x")
    for restart in range(3):
        run.job(f"7_{restart}", **{f"rank_{rank:04d}": RAN + 400 * "x" for rank in range(64)})
    for log in sorted((run.path / "logs" / "job7_2").glob("*.log")):
        log.write_bytes(RAN.encode() + bytes(200_000))
    size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    assert size > 15e6
    before = bytes_read()
    assert read_status(run.path, details=False).iteration == 19_999
    table = bytes_read() - before
    assert table < 1.5 * (1 << 19)
    before = bytes_read()
    read_status(run.path)
    assert bytes_read() - before < table + 3 * 1.5 * (1 << 22)


def test_a_slow_rank_is_shown_as_long_as_it_is_slow(run):
    slow = {"slowest rank": 17, "slowest host": "node2", "straggler share": 0.19}
    run.metrics(slow)
    text = format_status(read_status(run.path))
    assert "rank 17 on node2: others wait for it for 19% of an iteration" in text
    for faster in ({"straggler share": 0.09}, {"straggler share": None}, {}):
        run.metrics({**slow, **faster} if faster else {})
        assert read_status(run.path).slow is None
