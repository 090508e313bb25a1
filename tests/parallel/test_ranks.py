"""Ranks from the environment variables of each launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from megatron_llmjp.errors import UserError
from megatron_llmjp.parallel.ranks import find_ranks, node_name
from tests.support.processes import ROOT

MASTER = {"MASTER_ADDR": "n0", "MASTER_PORT": "1234"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
BATCH_STEP = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (OPEN_MPI, "mpirun"),
        (MPICH, "mpiexec"),
        (SRUN, "srun"),
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "16"}, "srun"),  # srun --mpi=pmi2
        ({**BATCH_STEP, **OPEN_MPI}, "mpirun"),
        ({**BATCH_STEP, **MPICH}, "mpiexec"),
        ({**SRUN, **TORCHRUN}, "torchrun"),
    ],
)
def test_ranks_of_every_launcher(env, launcher):
    ranks = find_ranks({**env, **MASTER})
    assert ranks is not None
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (5, 16, 1)
    assert (ranks.master_addr, ranks.master_port, ranks.launcher) == ("n0", "1234", launcher)


def test_tests_ignore_the_launcher_of_their_shell():
    """In a Slurm job, after nohup and with threads configured for training."""
    script = (
        "import os, signal, tests.conftest; from megatron_llmjp.parallel.ranks import find_ranks; "
        "print(find_ranks(), os.environ['OMP_NUM_THREADS'], int(signal.getsignal(signal.SIGHUP)))"
    )
    env = {**os.environ, **BATCH_STEP, **TORCHRUN, "OMP_NUM_THREADS": "64", "MKL_NUM_THREADS": "64"}
    command = ["nohup", sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["None", "1", "0"], done.stderr


def test_host_of_rank_zero():
    assert find_ranks({}) is None
    one_host = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "16"}
    assert find_ranks(one_host).master_addr == "127.0.0.1"  # type: ignore[union-attr]
    for env in (OPEN_MPI, MPICH):
        with pytest.raises(UserError, match="MASTER_ADDR is not set"):
            find_ranks(env)
    with pytest.raises(UserError, match="LOCAL_RANK = ''"):
        find_ranks({"RANK": "0", "WORLD_SIZE": "2"})


def test_name_of_this_machine():
    """Slurm's commands know a node by its own name, which may differ from the host's."""
    assert node_name({"SLURMD_NODENAME": "n7"}) == "n7" and node_name({}) == socket.gethostname()
