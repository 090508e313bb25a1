"""GPU specifications: peak TFLOP/s by dtype, memory and bandwidths, from NVIDIA's data sheets.

Peaks are dense, without structured sparsity, at boost clock; half precision on tensor cores with
fp32 accumulation. The fp32 peak is that of the CUDA cores, because by default torch does not use
tensor cores (TF32) for fp32 matrix products. Bandwidths are in GB/s and in one direction: half of
NVLink's or PCIe's total, which the data sheets give. Data sheets: V100 (2020), A100 (2021), H100
(2023), H200 (2024), L40S (2023), HGX B200 and B300 (2025), GB200 NVL72 (2024); the architecture
white papers GA102, AD102 and RTX Blackwell for GeForce and RTX; white papers for the rest.

The network is that of NVIDIA's reference systems, per GPU: HDR InfiniBand (200 Gb/s) in DGX A100,
NDR (400 Gb/s) in DGX H100, B200 and GB200, XDR (800 Gb/s) in DGX B300, and EDR (100 Gb/s) for two
GPUs in DGX-1 and DGX-2. PCIe cards have none: 200 Gb/s for two GPUs is assumed.
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
    memory_bandwidth: float
    """Of the GPU memory."""
    link: float
    """NVLink, or PCIe where there is none."""
    network: float
    bf16: bool = True
    """Whether the tensor cores support bf16."""
    products: str = "hopper"
    """Generation whose fitted efficiency of matrix products is used: ``ampere`` or ``hopper``."""

    def peak_tflops(self, dtype: str) -> float | None:
        """Return the peak in ``bf16``, ``fp16`` or ``fp32``; None for an unsupported dtype."""
        if dtype == "fp32":
            return self.single
        return None if dtype == "bf16" and not self.bf16 else self.half


# The first entry whose name occurs in a device's name is used: variants precede the base model.
_GPUS = (
    GpuSpec("GB300", 2500, 80, 288, 8000, 900, 100),
    GpuSpec("GB200", 2500, 80, 192, 8000, 900, 50),
    GpuSpec("B300", 2250, 75, 288, 8000, 900, 100),
    GpuSpec("B200", 2250, 75, 192, 8000, 900, 50),
    GpuSpec("B100", 1750, 60, 192, 8000, 900, 50),
    GpuSpec("GH200", 989.4, 67, 96, 4000, 450, 50),
    GpuSpec("H200 NVL", 835.5, 60, 141, 4800, 450, 50),
    GpuSpec("H200", 989.4, 67, 141, 4800, 450, 50),
    GpuSpec("H100 PCIe", 756, 51, 80, 2000, 300, 25),
    GpuSpec("H100 NVL", 835.5, 60, 94, 3900, 300, 25),
    GpuSpec("H100", 989.4, 67, 80, 3350, 450, 50),
    GpuSpec("H800", 989.4, 67, 80, 3350, 200, 50),
    GpuSpec("A100 40GB", 312, 19.5, 40, 1555, 300, 25, products="ampere"),
    GpuSpec("A100", 312, 19.5, 80, 2039, 300, 25, products="ampere"),
    GpuSpec("A800", 312, 19.5, 80, 2039, 200, 25, products="ampere"),
    GpuSpec("A40", 149.7, 37.4, 48, 696, 56.25, 12.5, products="ampere"),
    GpuSpec("A30", 165, 10.3, 24, 933, 100, 12.5, products="ampere"),
    GpuSpec("L40S", 362, 91.6, 48, 864, 32, 12.5, products="ampere"),
    GpuSpec("RTX PRO 6000", 503.8, 126, 96, 1792, 64, 12.5, products="ampere"),
    GpuSpec("RTX 6000 Ada", 364.2, 91.1, 48, 960, 32, 12.5, products="ampere"),
    GpuSpec("RTX A6000", 154.8, 38.7, 48, 768, 56.25, 12.5, products="ampere"),
    GpuSpec("RTX 5090", 209.5, 104.8, 32, 1792, 64, 12.5, products="ampere"),
    GpuSpec("RTX 4090", 165.2, 82.6, 24, 1008, 32, 12.5, products="ampere"),
    GpuSpec("RTX 3090", 71, 35.6, 24, 936, 56.25, 12.5, products="ampere"),
    GpuSpec("V100-PCIE", 112, 14, 32, 900, 16, 6.25, bf16=False, products="ampere"),
    GpuSpec("V100", 125, 15.7, 32, 900, 150, 6.25, bf16=False, products="ampere"),
)


def find_gpu(device_name: str) -> GpuSpec | None:
    """Look up a name as ``torch.cuda.get_device_name`` returns it; None if unknown."""
    name = device_name.upper()
    if "A100" in name and "40GB" in name:
        name = "A100 40GB"
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
