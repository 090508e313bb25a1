"""Jobs with a spare node on a real Slurm: lost nodes are replaced within the job."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.test_pretrain import ITERATIONS, JOB, SCRIPT, folds, words  # noqa: F401
from tests.support.processes import pretrain
from tests.support.timeouts import TIMEOUT
from tests.support.tolerances import TRAINED, assert_close
from tests.support.training import history

pytestmark = pytest.mark.long

SPARE = ["--nodes=3", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
SPARE += ["--mem=100", "--time=60", "--job-name=run"]
"""Batches of 4 are not divisible by 6 ranks: two nodes are used."""


@pytest.mark.timeout(3 * TIMEOUT)
def test_a_spare_node_takes_the_place_of_a_lost_one(
    cluster: Cluster,
    folds: Path,  # noqa: F811
    tmp_path: Path,
):
    """The job continues without a requeue; if its first node is lost, another one requeues it."""
    undisturbed, save = tmp_path / "undisturbed", tmp_path / "save"
    done = pretrain(*words(folds, undisturbed))
    assert done.returncode == 0, done.stderr
    env = {**JOB, "PREFLIGHT": "0", "GUARD_SECONDS": "1"}
    job = cluster.submit(*SPARE, SCRIPT, *words(folds, save), cwd=tmp_path, env=env)

    def iteration() -> int:
        metrics = save / "metrics.jsonl"
        return max(history(save), default=0) if metrics.exists() else 0

    def restarts() -> int:
        shown = cluster.run("scontrol", "show", "job", job)
        return int(re.search(r"Restarts=(\d+)", shown)[1])  # type: ignore[index]

    def wait_for_steps(logs: str) -> None:
        log = save / "logs" / logs / "rank_0000.log"
        cluster.wait_for(lambda: log.exists() and "process(es) by" in log.read_text(), logs)
        before = iteration()
        cluster.wait_for(lambda: iteration() > before + 2, f"steps of {logs}")

    wait_for_steps(f"job{job}_0")
    cluster.kill_node("n1")
    wait_for_steps(f"job{job}_0.1")
    assert restarts() == 0
    log = (tmp_path / f"run_{job}.log").read_text()
    assert "n1 is excluded: " in log, log
    assert "continuing in this job on 2 nodes: n0, n2" in log
    end = json.loads((save / "requeues.jsonl").read_text())
    assert (end["requeued"], end["in this job"]) == (True, True)
    assert [one["node"] for one in end["excluded"]] == ["n1"]

    cluster.kill_node("n0")
    cluster.wait_for(lambda: restarts() == 1, "the requeue after the loss of the first node")
    for node in ("n0", "n1"):
        cluster.start_node(node)
    assert cluster.wait(job) == "COMPLETED", (tmp_path / f"run_{job}.log").read_text()
    assert "NumNodes=3 " in cluster.run("scontrol", "show", "job", job)  # a spare one again
    assert "n0 is lost; requeueing" in (save / "logs" / f"job{job}_0.1" / "guard.log").read_text()

    expected = history(undisturbed)
    assert list(expected) == list(range(1, ITERATIONS + 1))
    assert_close(history(save), expected, TRAINED)
