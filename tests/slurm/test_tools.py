"""Preparing indices and converting as jobs of a real Slurm; the PBS example under a real mpirun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llmjp.checkpoint.manifest import complete_iterations
from tests.slurm.cluster import Cluster
from tests.support.datasets import write_folds
from tests.support.processes import ROOT
from tests.support.timeouts import PROCESS_TIMEOUT
from tests.support.training import TP2, arguments

pytestmark = pytest.mark.long

JOB = {"MEGATRON_LLMJP": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
SMALL = ["--cpus-per-task=1", "--mem=100", "--job-name=job"]


@pytest.fixture(scope="module")
def folds(tmp_path_factory) -> Path:
    return write_folds(tmp_path_factory.mktemp("folds"), (2, 2))


def run_job(cluster: Cluster, name: str, *words: str | Path, folder: Path) -> str:
    script = ROOT / "slurm" / f"{name}.sh"
    job = cluster.submit(*SMALL, script, *words, cwd=folder, env=JOB)
    state = cluster.wait(job)
    log = (folder / f"job_{job}.log").read_text()
    assert state == "COMPLETED", log
    return log


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun not found: install Open MPI")
def test_pbs_and_mpirun_then_indices_and_conversion(cluster: Cluster, folds: Path, tmp_path: Path):
    """Only qsub is replaced, by a script that records its arguments."""
    save, bin_folder = tmp_path / "save", tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "qsub").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/qsub\n')
    (bin_folder / "qsub").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost\nlocalhost\n")
    words = arguments("laptop-llama", folds, *TP2, "--save", save, "--exit-interval", 2)
    env = {
        **os.environ,
        **JOB,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PBS_O_WORKDIR": str(ROOT),
        "PBS_NODEFILE": str(tmp_path / "hosts"),
        "ARGS": " ".join(map(str, words)),
        "MPIRUN_FLAGS": "--allow-run-as-root --oversubscribe",
    }
    script = ROOT / "slurm" / "pretrain_llm-jp-3-13b.pbs"
    done = subprocess.run(
        ["bash", script], env=env, capture_output=True, text=True, timeout=PROCESS_TIMEOUT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es) by mpirun" in done.stdout
    assert max(complete_iterations(save)) == 2
    asked = (tmp_path / "qsub").read_text().splitlines()
    assert asked == ["-v", f"ARGS={env['ARGS']}", str(script)]

    data = ["--fold-file", folds, "--config", "laptop-llama"]
    cache = tmp_path / "cache"
    run_job(cluster, "build_indices", *data, "--data-cache-path", cache, folder=tmp_path)
    assert any(cache.iterdir())
    log = run_job(
        cluster,
        "convert_checkpoint",
        *("--to", "hf", "--input", save, "--output", tmp_path / "hf"),
        folder=tmp_path,
    )
    assert (tmp_path / "hf" / "model.safetensors").exists(), log
