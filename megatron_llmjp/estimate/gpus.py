"""What GPUs can do: peak TFLOP/s by type, and memory, from NVIDIA's data sheets.

Dense numbers, without structured sparsity, at boost clock; half precision on tensor cores with fp32
accumulation. fp32 is that of the ordinary cores, because torch keeps fp32 matrix products off the
tensor cores unless it is told otherwise. Data sheets: V100 (2020), A100 (2021), H100 (2023), H200
(2024), L40S (2023), HGX B200 and B300 (2025), and NVIDIA's architecture white papers for the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    half: float
    """Peak TFLOP/s in fp16 and bf16."""
    single: float
    """Peak TFLOP/s in fp32."""
    memory: float
    """Memory in GB of 10^9 bytes, of the largest of its kind."""
    bf16: bool = True
    """Whether its tensor cores know bf16."""

    def peak_tflops(self, dtype: str) -> float | None:
        """Peak in ``bf16``, ``fp16`` or ``fp32``; None where the type is not supported."""
        if dtype == "fp32":
            return self.single
        return None if dtype == "bf16" and not self.bf16 else self.half


# The first entry that is part of a device's name holds: special forms come before the plain one.
_GPUS = (
    Gpu("GB300", 2500, 80, 288),
    Gpu("GB200", 2500, 80, 192),
    Gpu("B300", 2250, 75, 288),
    Gpu("B200", 2250, 75, 192),
    Gpu("B100", 1750, 60, 192),
    Gpu("GH200", 989.4, 67, 96),
    Gpu("H200 NVL", 835.5, 60, 141),
    Gpu("H200", 989.4, 67, 141),
    Gpu("H100 PCIe", 756, 51, 80),
    Gpu("H100 NVL", 835.5, 60, 94),
    Gpu("H100", 989.4, 67, 80),
    Gpu("H800", 989.4, 67, 80),
    Gpu("A100", 312, 19.5, 80),
    Gpu("A800", 312, 19.5, 80),
    Gpu("A40", 149.7, 37.4, 48),
    Gpu("A30", 165, 10.3, 24),
    Gpu("L40S", 362, 91.6, 48),
    Gpu("V100-PCIE", 112, 14, 32, bf16=False),
    Gpu("V100", 125, 15.7, 32, bf16=False),
)


def find_gpu(device_name: str) -> Gpu | None:
    """The entry for a name as ``torch.cuda.get_device_name`` gives it; None if unknown."""
    name = device_name.upper()
    return next((gpu for gpu in _GPUS if gpu.name.upper() in name), None)


def memory_of(device_name: str) -> float | None:
    """Bytes of its memory, less than its kind's where the name says so; None if unknown.

    ``A100-SXM4-40GB`` has 40 GB; the 480 GB of ``GH200 480GB`` are those of its CPU.
    """
    gpu, said = find_gpu(device_name), re.search(r"(\d+)\s*GB\b", device_name, re.IGNORECASE)
    if gpu is None:
        return None
    return min(gpu.memory, float(said[1]) if said else gpu.memory) * 1e9


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Peak TFLOP/s of a device in ``bf16``, ``fp16`` or ``fp32``; None if unknown, as for a CPU."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.peak_tflops(dtype)
