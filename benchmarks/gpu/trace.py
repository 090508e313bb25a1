"""Summary of a trace of torch's profiler: host waits, longest kernels, idle time of the GPU.

The trace is Chrome's format, with durations in microseconds; the categories are those of Kineto:
``kernel``, ``gpu_memcpy`` and ``gpu_memset`` on the GPU, ``cuda_runtime`` and ``cuda_driver`` for
calls of the host.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS_SHOWN = 10

WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaFree",  # of the caching allocator, when it finds no block
    "cudaMalloc",  # the same; a sign of a growing or fragmented cache
)
"""Calls of the host that wait for the device."""

_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cuda_runtime", "cuda_driver")
_NAME_LENGTH = 90

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Summary:
    """Rows of the tables, per step."""

    waits: list[dict[str, Any]]
    kernels: list[dict[str, Any]]
    note: str


def read_trace(path: Path) -> list[Event]:
    """Read the events of a trace."""
    events: list[Event] = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return events


def summarize(events: Iterable[Event], steps: int) -> Summary:
    """Summarize the trace of some steps."""
    timed = [event for event in events if event.get("ph") == "X"]
    gpu = [event for event in timed if event.get("cat") in _GPU]
    host = [event for event in timed if event.get("cat") in _HOST]
    return Summary(_waits(host, gpu, steps), _kernels(gpu, steps), _utilization(gpu, steps))


def _waits(host: Sequence[Event], gpu: Sequence[Event], steps: int) -> list[dict[str, Any]]:
    rows = []
    for name in WAITS:
        calls = [event for event in host if event["name"] == name]
        rows.append(_row("call", name, calls, steps))
    pageable = [event for event in gpu if "Pageable" in event["name"]]
    return [*rows, _row("call", "copies from or to pageable memory", pageable, steps)]


def _kernels(gpu: Sequence[Event], steps: int) -> list[dict[str, Any]]:
    by_name: defaultdict[str, list[Event]] = defaultdict(list)
    for event in gpu:
        by_name[event["name"]].append(event)
    total = sum(event["dur"] for event in gpu) or 1.0
    rows = []
    for name, calls in by_name.items():
        share = sum(event["dur"] for event in calls) / total
        rows.append({**_row("kernel", name, calls, steps), "share of GPU time": share})
    rows.sort(key=lambda row: -row["share of GPU time"])
    return [
        {**row, "share of GPU time": f"{row['share of GPU time']:.1%}"}
        for row in rows[:KERNELS_SHOWN]
    ]


def _row(heading: str, name: str, calls: Sequence[Event], steps: int) -> dict[str, Any]:
    return {
        heading: name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 3]}...",
        "per step": len(calls) / steps,
        "ms per step": sum(event["dur"] for event in calls) / 1000 / steps,
    }


def _utilization(gpu: Sequence[Event], steps: int) -> str:
    """Describe for how much of the time the GPU ran at least one kernel or copy."""
    if not gpu:
        return "the profiler recorded no kernel"
    busy, end = 0.0, -1.0
    for event in sorted(gpu, key=lambda event: float(event["ts"])):
        start, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    first = min(float(event["ts"]) for event in gpu)
    kernels = sum(event["cat"] == "kernel" for event in gpu) / steps
    share = busy / (end - first)
    return f"{kernels:,.0f} kernels per step; the GPU was busy for {share:.1%} of the time"
