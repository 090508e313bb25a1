"""Part ``machine``: versions, GPU, driver and clocks, and the speed of a matrix product."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.results import NEEDS_GPU, Context

PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "apex", "triton", "liger-kernel",
    "flash-attn", "transformers", "numpy",
)  # fmt: skip

QUERIES = (
    "driver_version", "memory.total", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "temperature.gpu", "mig.mode.current",
)  # fmt: skip
"""Of nvidia-smi."""

PRODUCT_SIZE = 8192
COPIED_BYTES = 4 * 2**30


def measure(context: Context) -> None:
    """Record the facts of this machine, then measure a matrix product and a copy."""
    for name, value in _facts(context):
        context.results.add("machine", {"fact": name, "value": value})
    if context.is_cuda:
        for name, value in _measured():
            context.results.add("machine", {"fact": name, "value": value})
    else:
        context.results.add("machine", {"fact": "matrix product", "value": NEEDS_GPU})


def _facts(context: Context) -> Iterator[tuple[str, str]]:
    import torch

    if context.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        yield "GPU", torch.cuda.get_device_name()
        yield "GPU memory", f"{properties.total_memory / 1e9:.1f} GB"
        yield "compute capability", f"{properties.major}.{properties.minor}"
        yield "NCCL", ".".join(map(str, torch.cuda.nccl.version()))
        yield "cuDNN", str(torch.backends.cudnn.version())
        yield from _nvidia_smi()
    else:
        yield "GPU", NEEDS_GPU
    yield "CUDA of torch", str(torch.version.cuda)
    yield "Python", platform.python_version()
    yield "CPU", f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    for package in PACKAGES:
        yield package, _version(package)


def _version(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _nvidia_smi() -> Iterator[tuple[str, str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield "nvidia-smi", f"failed: {error}"
        return
    values = found.stdout.splitlines()[0].split(",")
    yield from zip(QUERIES, (value.strip() for value in values), strict=False)


def _measured() -> Iterator[tuple[str, str]]:
    """Measure what the GPU reaches: the peak of its data sheet is at a clock it may not hold."""
    import torch

    n = PRODUCT_SIZE
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * n**3 / _seconds(lambda: torch.mm(a, b))
    yield f"bf16 product of {n} x {n}", f"{flops / 1e12:.0f} TFLOP/s"
    source = torch.empty(COPIED_BYTES, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    rate = 2 * COPIED_BYTES / _seconds(lambda: target.copy_(source))
    yield "copy on the GPU", f"{rate / 1e12:.2f} TB/s read and written"
    host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    rate = 2**30 / _seconds(lambda: host.copy_(source[: 2**30], non_blocking=True))
    yield "copy to pinned memory", f"{rate / 1e9:.1f} GB/s"


def _seconds(operation: object, repeats: int = 20) -> float:
    import torch

    assert callable(operation)
    for _ in range(3):
        operation()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        operation()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats
