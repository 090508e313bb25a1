"""Measurements on torch devices; each runs in a process that may be killed."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_llmjp.config.model_config import DeviceChoice

REPEATS = 3
"""Measurements of which the best counts."""
_GPU_GEMM = 8192
_CPU_GEMM = 512


def probe_device(choice: DeviceChoice) -> tuple[str, int, str]:
    """Return the device of the run on this node, the number of GPUs, and why it lacks GPUs.

    Initializes the driver, which may hang.
    """
    from megatron_llmjp.parallel.visible_gpus import find_gpus

    gpus = find_gpus()
    kind = "cuda" if choice != "cpu" and gpus.count else "cpu"
    return kind, gpus.count if kind == "cuda" else 0, gpus.problem(choice)


def measure_gemm(kind: str, index: int, seconds: float) -> float:
    """Return the throughput of matrix multiplications in TFLOP/s.

    On a GPU, the median in bf16 over some seconds, which shows throttling; on a CPU in fp32 per
    second of CPU time, since its cores may be shared with other processes.

    Raises:
        RuntimeError: equal multiplications gave different results.
    """
    device = torch.device(kind, index) if kind == "cuda" else torch.device("cpu")
    size, dtype = (_GPU_GEMM, torch.bfloat16) if kind == "cuda" else (_CPU_GEMM, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    expected = a @ b
    batch, clock = (20, time.perf_counter) if kind == "cuda" else (1, time.process_time)
    rates: list[float] = []
    end = time.monotonic() + (seconds if kind == "cuda" else min(seconds, 0.2))
    while len(rates) < REPEATS or time.monotonic() < end:
        _synchronize(device)
        started = clock()
        for _ in range(batch):
            product = a @ b
        _synchronize(device)
        rates.append(batch * 2 * size**3 / (clock() - started) / 1e12)
    if not torch.equal(product, expected):
        raise RuntimeError("equal matrix multiplications gave different results")
    return statistics.median(rates) if kind == "cuda" else max(rates)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class GroupTest:
    """A test of the network between the devices of one or more nodes."""

    kind: str
    """``cuda`` or ``cpu``."""
    devices: int
    """Devices per node."""
    nodes: int
    address: tuple[str, int] | None
    """Host and port of the key-value store; None for a test within this node."""
    name: str
    """Unique name of the test, the prefix of its keys."""
    message_mib: int
    seconds: float
    """Longest wait for another process."""


def measure_group(
    test: GroupTest, node: int, local: int, folder: str, env: dict[str, str]
) -> tuple[list[float], float]:
    """Exchange messages with the other nodes of a test.

    Args:
        test: the test.
        node: number of this node within the test.
        local: index of this process's device.
        folder: folder of the key-value store of a test within this node.
        env: environment variables to set.

    Returns:
        Seconds of an exchange with the same device of the other node, both directions at once (one
        value for two nodes, otherwise none), and seconds of an all-reduce over all devices.

    Raises:
        RuntimeError: the network failed or changed data.
    """
    os.environ.update(env)
    world, rank = test.nodes * test.devices, node * test.devices + local
    device = torch.device("cuda", local) if test.kind == "cuda" else torch.device("cpu")
    timeout = timedelta(seconds=test.seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if test.kind == "cuda" else "gloo",
        store=_store(test, folder, world, timeout),
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if test.kind == "cuda" else None,
    )
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    if int(total.item()) != world:
        raise RuntimeError(f"an all-reduce of ones over {world} devices gave {int(total.item())}")
    message = torch.full((test.message_mib << 18,), float(rank), device=device)  # fp32
    exchanges = [_exchange(message, (rank + test.devices) % world)] if test.nodes == 2 else []
    message.fill_(1.0)
    all_reduce = _fastest(lambda: dist.all_reduce(message), device)
    dist.destroy_process_group()
    return exchanges, all_reduce


def _store(test: GroupTest, folder: str, world: int, timeout: timedelta) -> Any:
    if test.address is None:
        return dist.FileStore(str(Path(folder) / test.name), world)
    host, port = test.address
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(test.name, store)


def _exchange(message: torch.Tensor, other: int) -> float:
    """Send the message to another rank and receive its message; return the shortest time."""
    received = torch.empty_like(message)

    def exchange() -> None:
        operations = [
            dist.P2POp(dist.isend, message, other),
            dist.P2POp(dist.irecv, received, other),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    seconds = _fastest(exchange, message.device)
    if not bool((received == other).all()):
        raise RuntimeError(f"data received from rank {other} differ from those sent")
    return seconds


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        _synchronize(device)
        started = time.perf_counter()
        action()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def bus_bandwidth(mib: int, seconds: float, world: int) -> float:
    """Return the bus bandwidth of an all-reduce in GB/s, as nccl-tests define it."""
    return 2 * (world - 1) / world * (mib << 20) / seconds / 1e9


def measure_disk(folder: Path, node: str, mib: int) -> float:
    """Write a file to a folder, read its size, and return the write speed in GB/s.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: the file is shorter than written.
    """
    for abandoned in folder.glob(f".preflight-{node}-*"):  # of a check that was killed
        abandoned.unlink(missing_ok=True)
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".preflight-{node}-") as stream:
        started = time.perf_counter()
        for _ in range(mib):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        seconds = time.perf_counter() - started
        written = Path(stream.name).stat().st_size
    if written != mib << 20:
        raise RuntimeError("it loses data: a test file is shorter than written")
    return (mib << 20) / seconds / 1e9
