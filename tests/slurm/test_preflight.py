"""Preflight on a real Slurm: by hand, and a container that starts on no node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.test_pretrain import JOB, SCRIPT, SMALLER
from tests.support.processes import ROOT
from tests.support.timeouts import PROCESS_TIMEOUT

pytestmark = pytest.mark.long


def test_check_and_report_by_hand(cluster: Cluster, tmp_path: Path):
    command = ["srun", "--nodes=3", "--ntasks-per-node=2", ROOT / "slurm" / "preflight.py"]
    command += ["--save", tmp_path, "--free-disk-gb", "0.001", "--disk-mib", "1"]
    command += ["--command-seconds", "300", "--local-seconds", "300", "--total-seconds", "900"]
    path = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
    done = subprocess.run(
        list(map(str, command)),
        env={**cluster.env, "PATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["n0", "n1", "n2"]
    assert "preflight: 3 nodes passed; slowest link" in table[-1]
    (report,) = tmp_path.glob("preflight-*/report.json")
    assert json.loads(report.read_text())["fit"]


def test_a_container_that_starts_on_no_node_excludes_none(cluster: Cluster, tmp_path: Path):
    env = {**JOB, "RUN_IN": "/no/such/container exec", "EXCLUDE_BAD_NODES": "1"}
    save = ("--save", tmp_path / "save")
    job = cluster.submit(*SMALLER, SCRIPT, *save, cwd=tmp_path, env={**os.environ, **env})
    assert cluster.wait(job) == "FAILED"
    log = (tmp_path / f"run_{job}.log").read_text()
    assert "preflight: common cause: no node answered" in log and "/no/such/container" in log
    assert "excluding" not in log and "Restarts=0" in cluster.run("scontrol", "show", "job", job)
