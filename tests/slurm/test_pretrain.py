"""Slurm job script on a real Slurm: preemption, time limit, lost and unfit nodes, user errors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from megatron_llmjp.report.status import read_status
from slurm.requeue import MAX_FRUITLESS_STARTS, decide
from slurm.requeue import main as requeue_main
from tests.slurm.cluster import Cluster
from tests.support.datasets import write_folds
from tests.support.processes import ROOT, pretrain
from tests.support.timeouts import TIMEOUT
from tests.support.tolerances import TRAINED, assert_close
from tests.support.training import PP2, TP2, arguments, history

pytestmark = pytest.mark.long

SCRIPT = ROOT / "slurm" / "pretrain_llm-jp-3-1.8b.sh"

SMALLER = ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=2", "--cpus-per-task=1"]
SMALLER += ["--mem=100", "--time=60", "--signal=USR1@180", "--job-name=run"]

ITERATIONS = 40

JOB = {
    "MEGATRON_LLMJP": str(ROOT),
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
    "PREFLIGHT_FREE_GB": "0.1",
    "PREFLIGHT_SECONDS": "600",
    "PREFLIGHT_FLAGS": "--disk-mib 1 --command-seconds 300",
}


@pytest.fixture(scope="module")
def folds(tmp_path_factory) -> Path:
    return write_folds(tmp_path_factory.mktemp("folds"), (14, 14, 12), repeat=True)


def words(folds: Path, save: Path) -> list[str]:
    # Slurm grants GPUs, which are files here.
    common = ["--device", "cpu", "--save", save, "--eval-iters", 0, "--save-interval", 10]
    common += ["--hidden-dropout", 0]
    rows = {"padded_vocab_size": 256}  # the same with and without tensor parallelism
    return arguments("laptop-llama", folds, *common, **rows)


@pytest.mark.timeout(3 * TIMEOUT)
def test_job_is_requeued(cluster: Cluster, folds: Path, tmp_path: Path):
    """After preemption, time limit and a lost node, losses equal those of an undisturbed run."""
    undisturbed, save = tmp_path / "undisturbed", tmp_path / "save"
    done = pretrain(*words(folds, undisturbed))
    assert done.returncode == 0, done.stderr
    layout = [*TP2, *PP2, "--use-distributed-optimizer", "--sequence-parallel"]
    four, env = [*SMALLER, "--ntasks-per-node=2"], {**JOB, "PREFLIGHT": "0"}  # four starts
    job = cluster.submit(*four, SCRIPT, *words(folds, save), *layout, cwd=tmp_path, env=env)

    def iteration() -> int:
        metrics = save / "metrics.jsonl"
        return max(history(save), default=0) if metrics.exists() else 0

    def starts() -> int:
        shown = cluster.run("scontrol", "show", "job", job)
        running = "JobState=RUNNING" in shown
        return int(re.search(r"Restarts=(\d+)", shown)[1]) + running  # type: ignore[index]

    def next_start(number: int) -> None:
        cluster.wait_for(lambda: starts() >= number, f"start {number}")
        before = iteration()
        cluster.wait_for(lambda: iteration() > before + 2, f"steps of start {number}")

    next_start(1)
    cluster.run("scontrol", "requeue", job)  # as in a preemption
    next_start(2)
    reach_time_limit(cluster, job)
    cluster.wait_for(lambda: starts() >= 3, "the time limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    next_start(3)
    lost = nodes_of(cluster, job)[-1]
    cluster.kill_node(lost)
    cluster.wait_for(lambda: cluster.state(job) != "RUNNING", "the lost node")
    cluster.wait_for(lambda: starts() >= 4, "a start without the lost node")
    assert lost not in nodes_of(cluster, job) and len(nodes_of(cluster, job)) == 2
    cluster.start_node(lost)
    assert cluster.wait(job) == "COMPLETED", (tmp_path / f"run_{job}.log").read_text()

    expected = history(undisturbed)
    assert list(expected) == list(range(1, ITERATIONS + 1))
    assert_close(history(save), expected, TRAINED)
    ends = [json.loads(line) for line in (save / "requeues.jsonl").read_text().splitlines()]
    assert [ends[-1]["exit code"], ends[-1]["requeued"]] == [0, False]
    assert any(end["exit code"] == 3 and end["requeued"] for end in ends)
    log = (tmp_path / f"run_{job}.log").read_text()
    assert "4 process(es) by srun" in log
    assert (save / "logs" / f"job{job}_0" / "rank_0003.log").exists()


def test_a_hung_job_is_requeued_at_its_time_limit(cluster: Cluster, folds: Path, tmp_path: Path):
    """The ranks are replaced by processes that ignore all signals."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$1" in *pretrain_gpt.py) ;; *) exec {sys.executable} "$@" ;; esac\n'
        "trap '' TERM USR1 CONT; while true; do sleep 1; done\n"
    )
    python.chmod(0o755)
    save, env = tmp_path / "save", {**JOB, "PREFLIGHT": "0", "PYTHON": str(python)}
    one = [*SMALLER, "--ntasks-per-node=1"]
    job = cluster.submit(*one, SCRIPT, *words(folds, save), cwd=tmp_path, env=env)
    cluster.wait_for(lambda: bool(list(save.glob("logs/*/rank_0001.log"))), "ranks")
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+60")

    def is_requeued() -> bool:
        return "Restarts=1" in cluster.run("scontrol", "show", "job", job)

    cluster.wait_for(lambda: is_requeued() or cluster.state(job) == "TIMEOUT", "the time limit")
    log = (tmp_path / f"run_{job}.log").read_text()
    assert is_requeued() and "reached its time limit before its ranks had saved" in log, log
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    end = json.loads((save / "requeues.jsonl").read_text())
    assert [end["exit code"], end["requeued"]] == [3, True]


def reach_time_limit(cluster: Cluster, job: str) -> None:
    """Set a job's time limit to soon; stop its ranks until they are signaled, lest they finish."""
    ranks = cluster.tasks(job)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+200")
    cluster.wait_for(lambda: all(map(signaled, ranks)), "the signal before the time limit")
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def signaled(pid: int) -> bool:
    """Whether SIGUSR1 is pending for a process or has ended it: Slurm may continue stopped ones."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    pending = re.search(r"ShdPnd:\s*(\w+)", status)
    return bool(int(pending[1], 16) >> (signal.SIGUSR1 - 1) & 1)  # type: ignore[index]


def nodes_of(cluster: Cluster, job: str) -> list[str]:
    listed = re.search(
        r" NodeList=(\S+)", cluster.run("scontrol", "--oneliner", "show", "job", job)
    )
    return cluster.run("scontrol", "show", "hostnames", listed[1]).split()  # type: ignore[index]


def test_unfit_node_is_excluded(cluster: Cluster, folds: Path, tmp_path: Path):
    """A node has too few GPUs; the job is requeued without it and trains."""
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text(
        "#!/bin/sh\ncase $1 in --query-gpu*) ;; *) exit 0 ;; esac\necho 0, 10, 0, 81559, H100\n"
        '[ "$SLURMD_NODENAME" = n0 ] || echo 1, 10, 0, 81559, H100\n'
    )
    driver.chmod(0o755)
    path = f"{driver.parent}:{os.environ['PATH']}"
    env = {**JOB, "PATH": path, "EXCLUDE_BAD_NODES": "1"}
    short = [*words(folds, tmp_path / "save"), *TP2, "--train-iters", 3]
    job = cluster.submit(*SMALLER, SCRIPT, *short, cwd=tmp_path, env=env)
    state = cluster.wait(job)
    log = (tmp_path / f"run_{job}.log").read_text()
    assert state == "COMPLETED", log
    assert "preflight: n0: 1 of 2 GPUs" in log and "n0 is excluded: " in log
    assert "preflight: 2 nodes passed" in log
    assert nodes_of(cluster, job) == ["n1", "n2"]


def test_user_errors_are_not_requeued(cluster: Cluster, folds: Path, tmp_path: Path):
    env = {**JOB, "PREFLIGHT": "0"}
    save = tmp_path / "save"
    wrong = [*words(folds, save), "--tensor-model-parallel-size", "3"]
    job = cluster.submit(*SMALLER, SCRIPT, *wrong, cwd=tmp_path, env=env)
    assert cluster.wait(job) == "FAILED"
    log = (tmp_path / f"run_{job}.log").read_text()
    assert "error: 8 processes are not divisible by tensor 3" in log and "Traceback" not in log
    assert "not fixed by a requeue" in log and not list(save.glob("logs/*/rank_*.log"))
    end = json.loads((save / "requeues.jsonl").read_text())
    assert end["exit code"] == 2 and end["cause"].startswith("8 processes are not divisible by")


def test_the_error_of_another_rank_is_printed(cluster: Cluster, folds: Path, tmp_path: Path):
    """Rank 1 fails, and Slurm ends rank 0 before it prints anything: the ranks are replaced."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$1" in *pretrain_gpt.py) ;; *) exec {sys.executable} "$@" ;; esac\n'
        '[ "$SLURM_PROCID" = 1 ] || exec sleep 600\n'
        "echo 'error: shard 7 is truncated\n  copy it again'; exit 2\n"
    )
    python.chmod(0o755)
    save, env = tmp_path / "save", {**JOB, "PREFLIGHT": "0", "PYTHON": str(python)}
    one = [*SMALLER, "--ntasks-per-node=1"]
    job = cluster.submit(*one, SCRIPT, *words(folds, save), cwd=tmp_path, env=env)
    assert cluster.wait(job) == "FAILED"
    log = (tmp_path / f"run_{job}.log").read_text()
    assert "rank_0001.log:\nerror: shard 7 is truncated\n  copy it again\n" in log
    end = json.loads((save / "requeues.jsonl").read_text())
    assert [end["exit code"], end["cause"]] == [2, "shard 7 is truncated"]
    assert "shard 7 is truncated" in read_status(save).why


def test_a_job_with_more_nodes_than_its_layout_can_use(
    cluster: Cluster, folds: Path, tmp_path: Path
):
    """6 ranks cannot divide a global batch of 4; 4 ranks on two of the nodes can."""
    few = ["--nodes=3", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=100", "--job-name=run"]
    few += ["--gpus-per-node=2"]
    save = tmp_path / "save"
    run = [*words(folds, save), "--train-iters", 3]
    job = cluster.submit(*few, SCRIPT, *run, cwd=tmp_path, env={**JOB, "PREFLIGHT": "0"})
    state = cluster.wait(job)
    log = (tmp_path / f"run_{job}.log").read_text()
    assert state == "COMPLETED", log
    assert "warning: 2 of 3 nodes are used, with data-parallel size 4; n2 stays idle" in log
    assert "4 tasks on n[0-1]" in log and "4 process(es) by srun" in log
    assert list(history(save)) == [1, 2, 3]


def ends_at(*iterations: int) -> list[dict[str, object]]:
    return [{"iteration": iteration, "requeued": True} for iteration in iterations]


def test_decisions():
    assert decide(0, 100, [])[0] is False
    assert not decide(2, 100, [])[0]
    for code in (1, 3, 137):
        assert decide(code, 10, [])[0]
        assert decide(code, 20, ends_at(10, 10))[0]
        assert decide(code, 10, ends_at(10)[:0])[0]
        # The first start that ended at iteration 10 had saved that checkpoint.
        assert decide(code, 10, ends_at(*[10] * MAX_FRUITLESS_STARTS))[0]
        assert not decide(code, 10, ends_at(10, *[10] * MAX_FRUITLESS_STARTS))[0]
        assert decide(code, 10, [*ends_at(10, 10, 10), {"iteration": 10, "requeued": False}])[0]
    assert decide(1, 0, [])[0] and not decide(1, 0, ends_at(*[0] * MAX_FRUITLESS_STARTS))[0]


def test_an_unrecorded_end_is_not_requeued(tmp_path, capsys):
    (tmp_path / "requeues.jsonl").mkdir()
    assert requeue_main(["--save", str(tmp_path), "--code", "1"]) == 1
    assert "requeues.jsonl: Is a directory" in capsys.readouterr().out
