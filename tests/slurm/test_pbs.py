"""The launcher for PBS: its jobs, the successor, and errors."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from megatron_llmjp.checkpoint.manifest import complete_iterations
from tests.slurm.pbs import Pbs
from tests.support.datasets import write_folds
from tests.support.processes import ROOT
from tests.support.training import TP2, arguments

LAUNCHER = ROOT / "slurm" / "pretrain.pbs"
SITE = {
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
    "PREFLIGHT_FREE_GB": "0.1",
    "MPIRUN_FLAGS": "--allow-run-as-root",
}


@pytest.fixture
def pbs(tmp_path: Path) -> Pbs:
    return Pbs(tmp_path / "pbs")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun not found: install Open MPI")
def test_the_next_job_continues_in_the_same_folder(pbs: Pbs, tmp_path: Path):
    """Commas and spaces in arguments survive two submissions; relative paths keep their folder."""
    work = tmp_path / "a folder, with a comma"
    work.mkdir()
    folds = write_folds(work, (2, 2))
    flags = [*TP2, "--device", "cpu", "--save", "check, points", "--exit-interval", 2]
    words = arguments("laptop-llama", folds.relative_to(work), *flags)
    options = ["-N", "run", "-l", "select=1:mpiprocs=2", "-v", ",".join(SITE)]
    first = pbs.qsub(*options, "--", LAUNCHER, *words, cwd=work, **SITE)
    done = pbs.run(first)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es) by mpirun" in done.stdout
    assert "preflight: 1 nodes passed" in done.stdout
    save = work / "check, points"
    assert max(complete_iterations(save)) == 2
    assert pbs.waiting() == ["2"]
    done = pbs.run("2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(complete_iterations(save)) == 4 and pbs.waiting() == []
    ends = [json.loads(line) for line in (save / "requeues.jsonl").read_text().splitlines()]
    assert [(end["job"], end["exit code"]) for end in ends] == [("1.stub", 3), ("2.stub", 0)]
    assert len(list((save / "logs" / "job2_0").glob("rank_*.log"))) == 2
    assert not [path for path in pbs.home.iterdir() if not path.name.startswith(".")]


FAKE_PYTHON = f"""#!/bin/bash
# The programs that import torch are replaced; the others are real.
case "$1 $2" in
    *choose_nodes.py*) printf '1\\n%s\\n' "$(hostname)" > "$3" ;;
    *preflight.py*) echo "$(basename "$1") $2" ;;
    *pretrain_gpt.py*) shift; printf '<%s>' "$@"; exit 3 ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
FAKE_MPIRUN = """#!/bin/bash
echo "mpirun $*" | tr ' ' '\\n' > "$MPIRUN_LOG"
until [[ "$1" == */with_log.sh || "$1" == timeout ]]; do shift; done
OMPI_COMM_WORLD_RANK=0 exec "$@"
"""


def test_steps_of_a_job(pbs: Pbs, tmp_path: Path):
    """Environment, arguments, logs and the next job, with replaced mpirun and training."""
    work, fakes = tmp_path / "a folder", tmp_path / "fakes"
    for name, text in (("python", FAKE_PYTHON), ("mpirun", FAKE_MPIRUN)):
        fakes.mkdir(exist_ok=True)
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    work.mkdir()
    site = {"PYTHON": str(fakes / "python"), "MPIRUN_LOG": str(tmp_path / "words"), "NOTE": "a, b"}
    words = ["--save", "check, points", "--data-path", "1 a,b"]
    number = pbs.qsub("-N", "run", "-v", ",".join(site), "--", LAUNCHER, *words, cwd=work, **site)
    job = pbs.folder / "mpi"  # the real mpirun precedes the one of the user's PATH
    job.mkdir()
    (job / "mpirun").symlink_to(fakes / "mpirun")
    done = pbs.run(number, path=str(job))
    assert done.returncode == 0, done.stdout + done.stderr
    save = work / "check, points"
    log = (save / "logs" / "job1_0" / "rank_0000.log").read_text()
    assert re.fullmatch(
        r"<--exit-duration-in-mins><\d+\.\d+><--save><check, points><--data-path><1 a,b>", log
    )
    assert log in done.stdout
    passed = (tmp_path / "words").read_text().splitlines()
    assert {"NOTE", "PYTHONPATH", "MASTER_ADDR", "NCCL_DEBUG"} <= set(passed)
    assert not {"PBS_JOBID", "HOSTNAME", "PWD"} & set(passed)
    (end,) = map(json.loads, (save / "requeues.jsonl").read_text().splitlines())
    assert [end["job"], end["exit code"], end["requeued"]] == ["1.stub", 3, True]
    assert pbs.waiting() == ["2"]
    second = json.loads((pbs.folder / "jobs" / "2.json").read_text())
    assert second["command"] == [str(LAUNCHER), *words] and second["cwd"] == str(work)
    assert second["variables"]["NOTE"] == "a, b"


def test_errors_before_the_ranks_start(pbs: Pbs, tmp_path: Path):
    number = pbs.qsub(LAUNCHER, cwd=ROOT)
    done = pbs.run(number)
    assert done.returncode == 2 and "no arguments: PBS passes none to a script" in done.stderr
    number = pbs.qsub(LAUNCHER, cwd=tmp_path)
    assert "submit from the checkout, or export MEGATRON_LLMJP" in pbs.run(number).stderr
    site = ("-v", f"PYTHON={sys.executable},SAVE_MINUTES=60")
    number = pbs.qsub(*site, "--", LAUNCHER, "--config", "laptop-llama", cwd=tmp_path)
    assert "--save DIR is required" in pbs.run(number).stderr
    number = pbs.qsub(*site, "--", LAUNCHER, "--save", "x", cwd=tmp_path)
    done = pbs.run(number)
    assert done.returncode == 2 and "60 are kept for the last save (SAVE_MINUTES)" in done.stderr
    assert pbs.waiting() == []
