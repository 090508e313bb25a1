"""Rank and world size of this process, from the launcher's environment variables. Without torch."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from megatron_llmjp.errors import UserError

DEFAULT_PORT = "29500"
LOCAL_LAUNCHER = "--nproc-per-node"
LAUNCHER_VARIABLE = "MEGATRON_LLMJP_LAUNCHER"
"""Set by ``parallel/launcher.py``, to distinguish its ranks from those of torchrun."""
LAUNCHER_PROCESS_VARIABLE = "MEGATRON_LLMJP_LAUNCHER_PROCESS"
"""Process ID of the local launcher: ranks exit when it is gone."""
START_TIME_VARIABLE = "MEGATRON_LLMJP_STARTED"
"""Start time of the local launcher, in seconds of ``time.monotonic``, the same in all processes."""
_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"


# MPI launchers inside a Slurm job start their ranks by srun: their variables take precedence.
_MPI = "OMPI_COMM_WORLD"


@dataclass(frozen=True)
class Ranks:
    """Rank, world size and rendezvous address of this process."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: str
    launcher: str
    """The program that started the ranks, such as ``torchrun``."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints messages and writes shared files."""
        return self.rank == 0


def find_ranks(env: Mapping[str, str] = os.environ) -> Ranks | None:
    """Read the ranks from the variables of torchrun, mpirun, mpiexec or srun.

    Returns:
        None without a launcher.

    Raises:
        UserError: some of a launcher's variables are missing or invalid, or the host of rank 0 is
            unknown.
    """
    for names in _LAUNCHERS:
        if names.rank in env and names.identified_by in env:
            return Ranks(
                rank=_integer(env, names.rank),
                world_size=_integer(env, names.world_size),
                local_rank=_integer(env, names.local_rank),
                master_addr=env.get("MASTER_ADDR") or _first_host(env, names),
                master_port=env.get("MASTER_PORT", DEFAULT_PORT),
                launcher=env.get(LAUNCHER_VARIABLE, names.launcher),
            )
    return None


def node_name(env: Mapping[str, str] = os.environ) -> str:
    """Return the name of this machine: under Slurm the node's, which its commands expect."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def run_start_time(env: Mapping[str, str] = os.environ) -> float:
    """Return when the run was started on this machine, in seconds of ``time.monotonic``.

    This is the start time of the launcher if there is one: torchrun restarts failed ranks, which
    does not extend the time limit of the job.
    """
    if env.get(START_TIME_VARIABLE):
        return float(env[START_TIME_VARIABLE])
    return process_start_time(os.getppid() if env.get(_TORCHRUN_VARIABLE) else os.getpid())


def process_start_time(pid: int) -> float:
    """Return when a process of this machine was started, in seconds of ``time.monotonic``."""
    age = time.time() - psutil.Process(pid).create_time()
    return time.monotonic() - max(0.0, age)


def single_process() -> Ranks:
    """Return the ranks of a run of a single process."""
    return Ranks(0, 1, 0, "127.0.0.1", "0", "hand")


@dataclass(frozen=True)
class _LauncherVariables:
    """Environment variables of one launcher."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    identified_by: str
    """A variable that other launchers with the same ``rank`` variable do not set."""
    local_size: str


_LAUNCHERS = (
    _LauncherVariables(
        "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    ),
    _LauncherVariables(  # Open MPI
        "mpirun",
        f"{_MPI}_RANK",
        f"{_MPI}_SIZE",
        f"{_MPI}_LOCAL_RANK",
        f"{_MPI}_SIZE",
        f"{_MPI}_LOCAL_SIZE",
    ),
    _LauncherVariables(  # MPICH and Intel MPI
        "mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
    ),
    _LauncherVariables(
        "srun",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_TASKS_PER_NODE",
    ),
)


def _integer(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not value.isdigit():
        raise UserError(f"environment variable {name} = '{value}': expected a number")
    return int(value)


def _first_host(env: Mapping[str, str], names: _LauncherVariables) -> str:
    """Return the first host of a Slurm job, or this machine if all ranks run on it."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes:
        if env.get(names.local_size, env[names.world_size]) != env[names.world_size]:
            raise UserError(
                f"MASTER_ADDR is not set and {names.launcher} does not provide the host of rank 0: "
                "export it (Open MPI: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ...)"
            )
        return "127.0.0.1"
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"MASTER_ADDR is not set and the job's hosts '{nodes}' cannot be expanded: {error}"
        ) from None
    return listed.stdout.split()[0]
