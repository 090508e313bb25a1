"""Settings and thresholds of the preflight check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(default: float, text: str) -> Any:
    """Return a field that is an option of the command line."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Sizes and time limits of the measurements. Every wait has one of these limits."""

    answer_seconds: float = _option(
        180.0,
        "longest wait for the start of a node's check: containers and Python start from a shared "
        "file system on all nodes at once",
    )
    local_seconds: float = _option(
        90.0, "longest wait for the checks of one node after all have started"
    )
    link_seconds: float = _option(
        60.0, "longest duration of one test between nodes; most of it initializes NCCL"
    )
    command_seconds: float = _option(30.0, "longest duration of a command such as nvidia-smi")
    total_seconds: float = _option(450.0, "no further round of tests is started after this time")
    gpu_message_mib: int = _option(256, "size of the messages between GPUs")
    cpu_message_mib: int = _option(32, "size of the messages between nodes without GPUs")
    disk_mib: int = _option(64, "size of each of the files that every node writes to --save")
    min_disk_mib: int = _option(
        16, "smallest size whose write speed is compared; that of smaller files is a latency"
    )
    gemm_seconds: float = _option(
        3.0,
        "duration of the matrix multiplications on each GPU; throttling takes seconds to appear",
    )


@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which a node is unfit. Ratios are relative to the median of all nodes."""

    gpu_link_ratio: float = 2.0
    """Largest transfer time of a link."""
    cpu_link_ratio: float = 4.0
    """The same between nodes without GPUs, whose cores and network may be shared."""
    gpu_gemm_ratio: float = 0.85
    """Smallest GEMM throughput of a GPU; GPUs of one model differ by some percent."""
    cpu_gemm_ratio: float = 0.3
    """Smallest GEMM throughput of a node without GPUs, whose cores may be shared."""
    node_all_reduce_ratio: float = 0.7
    """Smallest all-reduce bandwidth between the GPUs of one node."""
    disk_ratio: float = 0.1
    """Smallest write speed of the fastest file; a shared file system varies much."""
    clock_seconds: float = 60.0
    """Largest clock offset; larger ones invalidate time stamps and certificates."""
    clock_note_seconds: float = 1.0
    """Clock offset that is mentioned: clocks are synchronized to milliseconds by NTP."""
    slow_share: float = 0.1
    """Largest share of nodes that are unfit because they are slow (at least one node): if more are,
    the cause is cooling, power or the file system, and a slow run is better than none."""
    xid_hours: float = 24.0
    """Age up to which a hardware error in the kernel log makes a node unfit."""

    def link_ratio(self, kind: str) -> float:
        """Return the largest transfer time of a link between nodes with devices of a kind."""
        return self.gpu_link_ratio if kind == "cuda" else self.cpu_link_ratio
