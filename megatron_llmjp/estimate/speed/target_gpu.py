"""GPU that a run is estimated for: by name, or by numbers given on the command line."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.flops import compute_dtype
from megatron_llmjp.estimate.speed.gpus import GpuSpec, find_gpu, gpu_memory


@dataclass(frozen=True)
class TargetGpu:
    """GPU that a run is estimated for; bandwidths are in bytes per second and one direction."""

    name: str
    memory: float
    """Bytes."""
    peak: float
    """FLOP/s in the dtype of the run."""
    per_node: int
    memory_bandwidth: float
    link_bandwidth: float
    """Between the GPUs of a node."""
    network_bandwidth: float
    """Between nodes, per GPU."""
    products: str = "hopper"
    """Generation whose efficiency of matrix products is used: ``ampere`` or ``hopper``."""


def resolve_gpu(config: Config, machine: PlannedMachine) -> TargetGpu:
    """Look up the GPU of a machine, with its peak in the dtype of the run.

    Numbers given on the command line replace those of the GPU type. A GPU of unknown name needs
    its peak, memory, memory bandwidth and link bandwidth.

    Raises:
        UserError: the GPU is unknown or does not support the dtype.
    """
    gpu, dtype = find_gpu(machine.gpu), compute_dtype(config)
    given = config.logging.gpu_peak_tflops
    if gpu is None:
        gpu = _unknown_gpu(machine, given)
    peak = given or gpu.peak_tflops(dtype)
    if peak is None:
        raise UserError(f"--gpu {gpu.name} does not support {dtype}: use --fp16")
    return TargetGpu(
        gpu.name,
        machine.gpu_memory or gpu_memory(machine.gpu) or 0.0,
        peak * 1e12,
        machine.gpus_per_node,
        machine.memory_bandwidth or gpu.memory_bandwidth * 1e9,
        machine.link_bandwidth or gpu.link * 1e9,
        machine.network_bandwidth or gpu.network * 1e9,
        gpu.products,
    )


def _unknown_gpu(machine: PlannedMachine, peak: float | None) -> GpuSpec:
    needed = {
        "--gpu-peak-tflops": peak,
        "--gpu-memory": machine.gpu_memory,
        "--memory-bandwidth": machine.memory_bandwidth,
        "--link-bandwidth": machine.link_bandwidth,
    }
    missing = [flag for flag, value in needed.items() if not value]
    if missing:
        raise UserError(
            f"--gpu {machine.gpu}: unknown GPU; expected a name such as A100, H100, H200 or B200, "
            f"or its numbers: add {' '.join(missing)}"
        )
    # The given numbers replace those of this entry; the network is that of DGX H100.
    return GpuSpec(machine.gpu, 0.0, 0.0, 0.0, 0.0, 0.0, 50.0)
