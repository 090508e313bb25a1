"""convert_checkpoint as an array of a real Slurm, compared with one process."""

from __future__ import annotations

import sys

import pytest

from megatron_llmjp.convert.cli import main
from tests.convert.hf_models import llama
from tests.convert.test_block_copy import same_files
from tests.slurm.cluster import Cluster
from tests.support.processes import ROOT

pytestmark = pytest.mark.long

SCRIPT = ROOT / "slurm" / "convert_checkpoint.sh"
JOB = ["--cpus-per-task=1", "--mem=100"]


def test_array_with_a_missing_task(cluster: Cluster, tmp_path):
    llama(rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    words = ["--to", "native", "--input", tmp_path / "hf", "--max-shard-size", "50kB", "--output"]
    assert main([str(word) for word in (*words, tmp_path / "whole")]) == 0
    env = {"MEGATRON_LLMJP": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    arguments = [SCRIPT, *words, tmp_path / "o"]

    job = cluster.submit("--array=1-2", *JOB, *arguments, cwd=tmp_path, env=env)
    cluster.wait(job)  # the number of tasks of the whole array is unknown
    log = "".join(path.read_text() for path in tmp_path.glob("convert_checkpoint_*.log"))
    assert cluster.state(job) == "FAILED" and "add --shard slurm/COUNT" in log

    shard = ["--shard", "slurm/3"]
    job = cluster.submit("--array=0,2", *JOB, *arguments, *shard, cwd=tmp_path, env=env)
    assert cluster.wait(job) == "COMPLETED"
    assert not (tmp_path / "o").exists()
    job = cluster.submit("--array=1", *JOB, *arguments, *shard, cwd=tmp_path, env=env)
    assert cluster.wait(job) == "COMPLETED"
    same_files(tmp_path / "o", tmp_path / "whole")
    job = cluster.submit("--array=0-2", *JOB, *arguments, cwd=tmp_path, env=env)
    assert cluster.wait(job) == "COMPLETED"  # already complete
