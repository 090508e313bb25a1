"""Preparing indices and converting as jobs of a real Slurm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.support.datasets import write_folds
from tests.support.processes import ROOT, pretrain
from tests.support.training import arguments

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


def test_indices_and_conversion(cluster: Cluster, folds: Path, tmp_path: Path):
    save = tmp_path / "save"
    words = arguments("laptop-llama", folds, "--save", save, "--exit-interval", 2)
    done = pretrain(*words)
    assert done.returncode == 3, done.stderr

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
