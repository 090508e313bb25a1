"""The device of a process, CUDA or CPU, and deterministic kernels."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import deterministic

from megatron_llmjp.config.model_config import DeviceChoice
from megatron_llmjp.parallel.cuda_environment import set_driver_variables
from megatron_llmjp.parallel.visible_gpus import VISIBLE_DEVICES, find_gpus
from megatron_llmjp.patches.torch_cuda_on_cpu import is_substituted, substitute_cpu_for_cuda

_DETERMINISTIC_ENVIRONMENT = {
    # One cuBLAS workspace, so that sums are computed in a fixed order.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Transformer Engine's attention without atomic additions.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # One reduction order in NCCL, which otherwise selects an algorithm by message size.
    "NCCL_ALGO": "Ring",
}


def use_deterministic_kernels(enabled: bool) -> None:
    """Enable or disable deterministic kernels in torch, Transformer Engine, cuBLAS and NCCL.

    Call it before the first kernel and process group. Environment variables that are already set
    keep their values. CPU results are deterministic either way. On a GPU the deterministic kernels
    are slower: attention's backward pass and scatters use other kernels, and NCCL uses one
    algorithm for every message size.
    """
    if is_substituted():  # the other function imports torch's compiler, which nothing uses on a CPU
        torch.set_deterministic_debug_mode("error" if enabled else "default")
    else:
        torch.use_deterministic_algorithms(enabled)
    if enabled:
        # Filling uninitialized memory with NaN costs time and only helps to find bugs.
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        for name, value in _DETERMINISTIC_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Device:
    """The device of this process and its communication backend."""

    kind: str
    """``cuda`` or ``cpu``."""
    backend: str
    """Backend of torch.distributed: ``nccl`` or ``gloo``."""
    name: str
    """Name for log lines."""
    uuid: str = ""
    """Identity of the GPU, by which two ranks on one GPU are found; empty if not known."""
    pci_address: str = ""
    """PCI address of the GPU, such as ``0000:18:00.0``; empty if not known."""
    problem: str = ""
    """Why this rank cannot use the device that it should."""

    @property
    def is_cuda(self) -> bool:
        """Whether kernels run asynchronously on a GPU."""
        return self.kind == "cuda"

    @property
    def torch(self) -> torch.device:
        """The device of this process."""
        if self.is_cuda:
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def memory(self) -> dict[str, float]:
        """Memory in bytes by metric name; on a CPU, the peak resident set size only."""
        if not self.is_cuda:
            unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return {"memory peak bytes": float(peak)}
        return {
            "memory peak bytes": float(torch.cuda.max_memory_allocated()),
            "memory allocated bytes": float(torch.cuda.memory_allocated()),
            "memory reserved bytes": float(torch.cuda.memory_reserved()),
        }


def setup(local_rank: int = 0) -> Device:
    """Select the best device that this process sees; without a GPU, ``torch.cuda`` is replaced.

    For programs that do not train. Ranks of a run use :func:`setup_rank`.
    """
    set_driver_variables()
    if torch.cuda.is_available() and not is_substituted():
        return _use_gpu(local_rank % torch.cuda.device_count())
    return _use_cpu()


def setup_rank(choice: DeviceChoice, local_rank: int) -> Device:
    """Select the device of a rank of a run.

    Args:
        choice: ``auto`` for a GPU wherever one is expected (:mod:`.visible_gpus`), else the CPU;
            ``cuda`` to require a GPU; ``cpu`` to ignore all GPUs.
        local_rank: rank among those of this machine. Ranks that see all GPUs of the machine use
            the one of their number; a rank that sees a single one uses that.

    Returns:
        The device. If there is none as expected, its ``problem`` says why: all ranks have to meet
        in :func:`~megatron_llmjp.parallel.device_agreement.check_devices` before one may fail.
    """
    set_driver_variables()
    if choice == "cpu":
        os.environ[VISIBLE_DEVICES] = ""  # for libraries too
        return _use_cpu()
    if is_substituted():
        return _use_cpu()
    gpus = find_gpus()
    if gpus.count == 0:
        return _use_cpu(gpus.problem(choice))
    try:
        return _use_gpu(local_rank % gpus.count)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        return _use_cpu(f"GPU {local_rank % gpus.count} of {gpus.count} cannot be used: {reason}")


def _use_gpu(index: int) -> Device:
    torch.cuda.set_device(index)
    properties = torch.cuda.get_device_properties(index)
    name, uuid = torch.cuda.get_device_name(), str(getattr(properties, "uuid", ""))
    return Device("cuda", "nccl", name, uuid, _pci_address(properties))


def _pci_address(properties: Any) -> str:
    """Return a GPU's PCI address as the kernel writes it; empty if torch does not report it."""
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    parts: list[Any] = [getattr(properties, name, None) for name in names]
    return "" if None in parts else "{:04x}:{:02x}:{:02x}.0".format(*parts)


def _use_cpu(problem: str = "") -> Device:
    substitute_cpu_for_cuda()
    name = f"CPU, {torch.get_num_threads()} thread(s) per rank"
    return Device("cpu", "gloo", name, problem=problem)
