"""Which process am I? Asked before torch is imported, of whoever started the process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from megatron_llmjp.errors import UserError

DEFAULT_PORT = "29500"
LOCAL_LAUNCHER = "--nproc-per-node"
LAUNCHER_VARIABLE = "MEGATRON_LLMJP_LAUNCHER"
"""Tells ranks that were started by ``parallel/launcher.py`` from those of torchrun."""
LAUNCHER_PROCESS_VARIABLE = "MEGATRON_LLMJP_LAUNCHER_PROCESS"
"""Its process number: a rank whose launcher is gone must not train on."""
START_TIME_VARIABLE = "MEGATRON_LLMJP_STARTED"
"""When it was started, in seconds of ``time.monotonic``, which a machine's processes share."""
_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class Ranks:
    """This process's place among all processes of a run."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: str
    started_by: str

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def find_ranks(env: Mapping[str, str] = os.environ) -> Ranks | None:
    """The ranks that torchrun, mpirun, mpiexec or srun put into the environment.

    Returns:
        None without a launcher.

    Raises:
        UserError: a launcher set some of its variables but not all, or nothing tells on which host
            the first rank is.
    """
    for names in _LAUNCHERS:
        if names.rank in env and names.known_by in env:
            return Ranks(
                rank=_integer(env, names.rank),
                world_size=_integer(env, names.world_size),
                local_rank=_integer(env, names.local_rank),
                master_addr=env.get("MASTER_ADDR") or _first_host(env, names),
                master_port=env.get("MASTER_PORT", DEFAULT_PORT),
                started_by=env.get(LAUNCHER_VARIABLE, names.launcher),
            )
    return None


def run_start_time(env: Mapping[str, str] = os.environ) -> float:
    """When the run was started here, in seconds of ``time.monotonic``.

    That is when its launcher was, where that is known: torchrun starts ranks again after a failure,
    and the time of the job keeps running.
    """
    if env.get(START_TIME_VARIABLE):
        return float(env[START_TIME_VARIABLE])
    return process_start_time(os.getppid() if env.get(_TORCHRUN_VARIABLE) else os.getpid())


def process_start_time(number: int) -> float:
    """When a process of this machine was started, in seconds of ``time.monotonic``."""
    age = time.time() - psutil.Process(number).create_time()
    return time.monotonic() - max(0.0, age)


def single_process() -> Ranks:
    """The ranks of a run of one process."""
    return Ranks(0, 1, 0, "127.0.0.1", "0", "hand")


@dataclass(frozen=True)
class _LauncherVariables:
    launcher: str
    rank: str
    world_size: str
    local_rank: str
    known_by: str
    """Who else sets ``rank`` does not set this."""
    local_size: str


# Inside a Slurm job the MPI launchers are started by an srun of their own: they are asked first.
_MPI = "OMPI_COMM_WORLD"
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
    """The first host of a Slurm job; this one, when all ranks are on it."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes:
        if env.get(names.local_size, env[names.world_size]) != env[names.world_size]:
            raise UserError(
                f"MASTER_ADDR is not set and {names.launcher} does not tell the first rank's host: "
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
