"""The start of a job: where the script is, its environment, the CPUs of its ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.layout_validation import layout_problems
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.estimate.usable_nodes import choose_nodes
from slurm.choose_nodes import cpus_per_task
from tests.slurm.cluster import INSTALL, Cluster, missing_programs
from tests.support.datasets import write_folds
from tests.support.processes import ROOT
from tests.support.timeouts import TIMEOUT
from tests.support.training import arguments, history

BARE = {"PATH": os.environ["PATH"]}
SETTINGS = "PREFLIGHT=0 OMP_NUM_THREADS=1\nexport OMP_NUM_THREADS\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout of its own, with a space in its path, a .venv and a site.sh."""
    folder = tmp_path / "check out"
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    for name in ("megatron_llmjp", "pretrain_gpt.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "slurm" / "site.sh").write_text(SETTINGS)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.mark.long
@pytest.mark.timeout(2 * TIMEOUT)
def test_ranks_have_all_their_cpus(checkout: Path, tmp_path_factory):
    """Submitted from another folder, without the environment of the shell."""
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not found: {INSTALL}")
    cpus = sorted(os.sched_getaffinity(0))[:4]
    if len(cpus) < 2:
        pytest.skip("one CPU: a rank cannot have more")
    work = tmp_path_factory.mktemp("work")
    folds, save = write_folds(work, (30,), repeat=True), work / "save"
    run = arguments("laptop-llama", folds, "--device", "cpu", "--save", save, "--eval-iters", 0)
    script = checkout / "slurm" / "pretrain_llm-jp-3-150m.sh"
    flags = ["--nodes=2", "--ntasks-per-node=1", f"--cpus-per-task={len(cpus)}", "--mem=100"]
    flags += ["--gpus-per-node=2", "--time=60", "--job-name=run", "--export=NONE"]
    with Cluster(
        tmp_path_factory.mktemp("affinity"), cpus=len(cpus), task_plugin="task/affinity"
    ) as cluster:
        job = cluster.submit(*flags, script, *run, cwd=work)

        def has_ranks() -> bool:
            return len(cluster.tasks(job)) == 2 or cluster.state(job) not in ("PENDING", "RUNNING")

        cluster.wait_for(has_ranks, "ranks")
        bound = [sorted(os.sched_getaffinity(pid)) for pid in cluster.tasks(job)]
        log = work / f"run_{job}.log"
        assert bound == [cpus, cpus], log.read_text()
        assert cluster.wait(job) == "COMPLETED", log.read_text()
    assert history(save)


def test_a_copied_script_names_the_variable_to_set(tmp_path: Path):
    """As in Slurm's spool folder, where no record of the job says where the original is."""
    script = tmp_path / "slurm_script"
    shutil.copy(ROOT / "slurm" / "pretrain_llm-jp-3-150m.sh", script)
    done = subprocess.run(["bash", script], capture_output=True, text=True, cwd=tmp_path, env=BARE)
    assert done.returncode and "MEGATRON_LLMJP: is not set: export it" in done.stderr


def test_cpus_of_a_rank():
    """112 cores with two threads each and 8 GPUs: 28 per rank, so that 4 ranks fill a socket."""
    assert cpus_per_task(8, 8, "224(x63)") == 28
    assert cpus_per_task(8, 8, "224(x63),96") == 12  # the smallest node
    assert cpus_per_task(8, 8, "64") == cpus_per_task(8, 8, "") == 8


def nodes_for(*flags: str, nodes: int, ranks_per_node: int = 8) -> tuple[int, str]:
    names = [f"n{i}" for i in range(nodes)]
    choice = choose_nodes(parse(flags).config, names, ranks_per_node)
    assert [*choice.used, *choice.idle] == names
    return len(choice.used), choice.note


def test_nodes_that_keep_the_global_batch():
    """172B: a replica takes 8 nodes, and 1728 sequences are divisible by 6 and 8, not by 7."""
    large = ("--config", "llm-jp-3-172b")
    assert nodes_for(*large, nodes=64) == (64, "")
    assert nodes_for(*large, nodes=65)[0] == 64  # a spare one
    used, note = nodes_for(*large, nodes=63)
    assert used == 48 and note.startswith("48 of 63 nodes are used, with data-parallel size 6; n48")
    assert "and 7 more stay idle" in note and "504 processes are not divisible by" in note
    assert nodes_for(*large, nodes=15)[0] == 8
    assert nodes_for(*large, nodes=7) == (7, "")  # too few: the check of the run says so
    small = ("--config", "laptop-llama", "--micro-batch-size", "1", "--global-batch-size", "64")
    assert nodes_for(*small, nodes=7)[0] == 4
    ramp = ("--rampup-batch-size", "16", "16", "1000")
    assert nodes_for(*small, *ramp, nodes=4)[0] == 2  # 16 = 2 x 8
    assert nodes_for(*small, "--num-attention-heads", "3", nodes=3)[0] == 2


def test_the_largest_number_of_nodes():
    """Against all numbers of nodes, by the rules that the run itself checks."""
    preset = parse(["--config", "llm-jp-3-13b"]).config
    for batch, nodes in ((1024, 16), (1024, 15), (960, 15), (1000, 14), (36, 9)):
        config = replace_fields(preset, global_batch_size=batch)
        valid = [n for n in range(1, nodes + 1) if not list(layout_problems(config, 8 * n))]
        expected = max(valid, default=0)
        used = len(choose_nodes(config, [str(n) for n in range(nodes)], 8).used)
        assert used == (expected if 2 * expected >= nodes else nodes)
