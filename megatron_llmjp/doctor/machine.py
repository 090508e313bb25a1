"""Diagnosis of a machine: GPUs, compilers, launchers, network, memory, limits, disk."""

from __future__ import annotations

import os
import resource
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_llmjp.doctor.findings import Finding
from megatron_llmjp.doctor.packages import INSTALLATION, TorchState
from megatron_llmjp.doctor.versions import driver_version
from megatron_llmjp.formatting import format_bytes
from megatron_llmjp.versions import cuda_of_torch

SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY = 1 << 30
"""NCCL and data workers share memory; containers have 64 MB by default."""
MIN_OPEN_FILES = 4096
"""Sockets of the ranks of a node, and files of datasets and checkpoints."""
MIN_DISK = 10**10


def machine_findings(torch: TorchState | None, folder: Path) -> Iterator[Finding]:
    """Yield the findings on this machine.

    Args:
        torch: the imported torch; None if it was not imported.
        folder: folder whose disk is checked.
    """
    yield from _gpus(torch)
    yield _compiler()
    yield _program(
        "CUDA compiler", ("nvcc",), "building Transformer Engine and Apex", "module load cuda"
    )
    yield _program(
        "Slurm", ("sbatch", "srun"), "the job scripts in slurm/", "run on a login node of a cluster"
    )
    yield _program("PBS", ("qsub",), "slurm/pretrain.pbs", "run on a login node of a PBS cluster")
    yield _program(
        "MPI", ("mpirun", "mpiexec"), "starting ranks with mpirun", "module load openmpi; optional"
    )
    yield _infiniband()
    yield _shared_memory()
    yield _open_files()
    yield _locked_memory()
    yield _disk(folder)


def _gpus(torch: TorchState | None) -> Iterator[Finding]:
    driver = driver_version()
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    yield Finding(
        "NVIDIA driver",
        "ok" if driver else "broken" if devices else "missing",
        driver or ("/dev/nvidia0 exists, the driver does not answer" if devices else "none"),
        "training on GPUs",
        "NVIDIA's installation guide; in a container: --nv or --gpus all",
    )
    gpus = torch.gpus if torch is not None else ()
    if gpus:
        found = f"{len(gpus)} x {gpus[0]}"
    elif torch is None and devices:
        found = f"{len(devices)}, not tested (--no-import)"
    elif cuda_of_torch() is None and devices:
        found = f"{len(devices)}, but torch is a CPU build"
    else:
        found = "torch sees none" if torch is not None else "none"
    is_untested = torch is None and bool(devices)
    yield Finding(
        "GPU",
        "ok" if gpus or is_untested else "broken" if devices else "missing",
        found,
        "training at scale; without one, runs use the CPU (--device cpu)",
        f"a build of torch for the driver ({INSTALLATION}); CUDA_VISIBLE_DEVICES; nvidia-smi",
    )
    nccl = torch.nccl if torch is not None else None
    yield Finding(
        "NCCL",
        "ok" if nccl or (torch is None and cuda_of_torch()) else "missing",
        nccl or "part of torch's CUDA builds",
        "communication between GPUs; runs on a CPU use gloo",
        f"a CUDA build of torch: {INSTALLATION}",
    )


def _compiler() -> Finding:
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    path = next(filter(None, map(shutil.which, names)), None)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    missing = ["a C compiler"] if path is None else []
    missing += [] if header.is_file() else [f"Python's headers ({header})"]
    return Finding(
        "C compiler",
        "missing" if missing else "ok",
        f"missing: {' and '.join(missing)}" if missing else str(path),
        "compiled element-wise operations on GPUs (layers: no fusions without it)",
        "gcc and python3-dev, on the nodes that train",
    )


def _program(name: str, programs: Sequence[str], needed_for: str, remedy: str) -> Finding:
    path = next(filter(None, map(shutil.which, programs)), None)
    found = path or f"no {' or '.join(programs)}"
    return Finding(name, "ok" if path else "missing", found, needed_for, remedy)


def _infiniband() -> Finding:
    try:
        devices = sorted(path.name for path in Path("/sys/class/infiniband").iterdir())
    except OSError:
        devices = []
    return Finding(
        "InfiniBand",
        "ok" if devices else "missing",
        ", ".join(devices) or "no adapters",
        "fast communication between nodes; one node does not need it",
        "the drivers of the adapters; in a container: bind /dev/infiniband",
    )


def _shared_memory() -> Finding:
    size = _free(SHARED_MEMORY)
    found = "does not exist" if size is None else f"{format_bytes(size)} free"
    return Finding(
        str(SHARED_MEMORY),
        "ok" if size is not None and size >= MIN_SHARED_MEMORY else "broken",
        found,
        "data workers and NCCL: at least 1 GB",
        "remove old files; in a container: --shm-size=16g or --ipc=host",
    )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_enough = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    return Finding(
        "open files",
        "ok" if is_enough else "broken",
        f"limit {_limit(soft)} (at most {_limit(hard)})",
        f"many ranks and datasets: at least {MIN_OPEN_FILES:,}",
        f"ulimit -n {_limit(hard) if hard != resource.RLIM_INFINITY else 65536}",
    )


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_limited = soft != resource.RLIM_INFINITY and soft < MIN_SHARED_MEMORY
    has_adapters = Path("/sys/class/infiniband").is_dir()
    return Finding(
        "locked memory",
        "broken" if is_limited and has_adapters else "ok",
        f"limit {'none' if soft == resource.RLIM_INFINITY else format_bytes(soft)}",
        "RDMA of NCCL over InfiniBand: no limit",
        "ulimit -l unlimited; in Slurm: PropagateResourceLimitsExcept=MEMLOCK",
    )


def _disk(folder: Path) -> Finding:
    size = _free(folder)
    return Finding(
        "disk",
        "ok" if size is not None and size >= MIN_DISK else "broken",
        f"{folder}: " + (f"{format_bytes(size)} free" if size is not None else "does not exist"),
        "checkpoints and indices: at least 10 GB, for large models terabytes",
        "free some space, or choose another folder: doctor --folder DIR",
    )


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)
