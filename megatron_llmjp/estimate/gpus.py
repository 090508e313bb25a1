"""GPU specifications: peak TFLOP/s by dtype, and memory, from NVIDIA's data sheets.

Peaks are dense, without structured sparsity, at boost clock; half precision on tensor cores with
fp32 accumulation. The fp32 peak is that of the CUDA cores, because by default torch does not use
tensor cores (TF32) for fp32 matrix products. Data sheets: V100 (2020), A100 (2021), H100 (2023),
H200 (2024), L40S (2023), HGX B200 and B300 (2025); NVIDIA's architecture white papers for the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSpec:
    """Specification of one GPU model."""

    name: str
    half: float
    """Peak TFLOP/s in fp16 and bf16."""
    single: float
    """Peak TFLOP/s in fp32."""
    memory: float
    """Memory of the largest variant, in GB of 10^9 bytes."""
    bf16: bool = True
    """Whether the tensor cores support bf16."""

    def peak_tflops(self, dtype: str) -> float | None:
        """Return the peak in ``bf16``, ``fp16`` or ``fp32``; None for an unsupported dtype."""
        if dtype == "fp32":
            return self.single
        return None if dtype == "bf16" and not self.bf16 else self.half


# The first entry whose name occurs in a device's name is used: variants precede the base model.
_GPUS = (
    GpuSpec("GB300", 2500, 80, 288),
    GpuSpec("GB200", 2500, 80, 192),
    GpuSpec("B300", 2250, 75, 288),
    GpuSpec("B200", 2250, 75, 192),
    GpuSpec("B100", 1750, 60, 192),
    GpuSpec("GH200", 989.4, 67, 96),
    GpuSpec("H200 NVL", 835.5, 60, 141),
    GpuSpec("H200", 989.4, 67, 141),
    GpuSpec("H100 PCIe", 756, 51, 80),
    GpuSpec("H100 NVL", 835.5, 60, 94),
    GpuSpec("H100", 989.4, 67, 80),
    GpuSpec("H800", 989.4, 67, 80),
    GpuSpec("A100", 312, 19.5, 80),
    GpuSpec("A800", 312, 19.5, 80),
    GpuSpec("A40", 149.7, 37.4, 48),
    GpuSpec("A30", 165, 10.3, 24),
    GpuSpec("L40S", 362, 91.6, 48),
    GpuSpec("V100-PCIE", 112, 14, 32, bf16=False),
    GpuSpec("V100", 125, 15.7, 32, bf16=False),
)


def find_gpu(device_name: str) -> GpuSpec | None:
    """Look up a name as ``torch.cuda.get_device_name`` returns it; None if unknown."""
    name = device_name.upper()
    return next((gpu for gpu in _GPUS if gpu.name.upper() in name), None)


def gpu_memory(device_name: str) -> float | None:
    """Return the memory in bytes, or the smaller size given in the name; None if unknown.

    ``A100-SXM4-40GB`` has 40 GB; the 480 GB of ``GH200 480GB`` are CPU memory.
    """
    gpu, named = find_gpu(device_name), re.search(r"(\d+)\s*GB\b", device_name, re.IGNORECASE)
    if gpu is None:
        return None
    return min(gpu.memory, float(named[1]) if named else gpu.memory) * 1e9


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Return the peak TFLOP/s of a device in ``bf16``, ``fp16`` or ``fp32``; None if unknown."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.peak_tflops(dtype)
