"""Evidence of sick nodes of a job, from the files that its preflight and its ranks wrote.

Only what points to single nodes is evidence: an error that any rank may print is not. Whether the
nodes are excluded is decided in ``exclusions.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.interval_stats import SLOW_SHARE
from megatron_llmjp.metric_registry import (
    LM_LOSS,
    METRICS_FILE,
    SLOWEST_HOST,
    STRAGGLER_SHARE,
)
from megatron_llmjp.preflight.result import read_result
from megatron_llmjp.report.jobs import HANG_SUSPECTS, LOG_BYTES, tail
from megatron_llmjp.report.json_lines import parse_object

LOST, SILENT, DRAINED = "lost", "silent", "drained"
HANG, HARDWARE, SLOW = "hang", "hardware", "slow"
PREFLIGHT = "preflight"

HARDWARE_ERRORS = re.compile(
    r"uncorrectable ECC error|uncorrectable NVLink error|or a hardware error"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|no CUDA-capable device is detected"
    r"|system not yet initialized|GPU is lost|fallen off the bus",
    re.IGNORECASE,
)
"""Messages of the CUDA runtime (``cudaGetErrorString``) and of NVML about the device, not about the
program: cudaErrorECCUncorrectable, NvlinkUncorrectable, Contained, DevicesUnavailable, NoDevice,
SystemNotReady; NVML_ERROR_GPU_IS_LOST."""

SLOW_INTERVALS = 5
"""Log intervals in a row in which the same node is the slowest."""


@dataclass(frozen=True)
class SickNode:
    """A node that seems to be sick."""

    node: str
    kind: str
    reason: str
    iteration: int | None = None
    """Iteration at which the run hung."""


def unfit_nodes(logs: Path) -> tuple[list[SickNode], str]:
    """Return the nodes that preflight found unfit, and a cause common to most nodes, if any.

    Args:
        logs: folder of the logs of this start of the job.
    """
    result = read_result(logs)
    found = [SickNode(node, PREFLIGHT, "; ".join(why)) for node, why in result.unfit.items()]
    return found, "; ".join(result.common)


def hung_nodes(save: Path, started: float) -> list[SickNode]:
    """Return the nodes of the ranks that the watchdog names after a hang of this start.

    Args:
        save: folder of the checkpoints.
        started: start of the ranks, in seconds since the epoch; older reports are not read.
    """
    path = save / HANG_SUSPECTS
    report = _read_json(path) if _is_written_since(path, started) else {}
    suspects, iteration = report.get("suspects"), report.get("iteration")
    if not isinstance(suspects, list) or not isinstance(iteration, int):
        return []
    nodes: dict[str, list[dict[str, Any]]] = {}
    for suspect in suspects:
        if isinstance(suspect, dict) and suspect.get("host"):
            nodes.setdefault(str(suspect["host"]), []).append(suspect)
    return [
        SickNode(
            node,
            HANG,
            f"hang at iteration {iteration}: rank {ranks[0].get('rank')}: {ranks[0].get('why')}",
            iteration,
        )
        for node, ranks in nodes.items()
    ]


def failed_gpus(logs: Path, nodes: Sequence[str], ranks_per_node: int) -> list[SickNode]:
    """Return the nodes on which a rank's error is one of the GPU.

    Args:
        logs: folder of the logs of this start of the job.
        nodes: nodes of the ranks, in the order of the ranks.
        ranks_per_node: ranks on each node.
    """
    found = []
    for path in sorted(logs.glob("rank_*.log")):
        number = path.stem.removeprefix("rank_")
        index = int(number) // ranks_per_node if number.isdigit() else len(nodes)
        line = next((text for text in tail(path, LOG_BYTES) if HARDWARE_ERRORS.search(text)), None)
        if line is not None and index < len(nodes):
            reason = f"rank {int(number)}: {line.strip()[:200]}"
            found.append(SickNode(nodes[index], HARDWARE, reason))
    return one_per_node(found)


def slow_nodes(save: Path, started: float) -> list[SickNode]:
    """Return the node that was the slowest in the last log intervals, if it costs much."""
    path = save / METRICS_FILE
    if not _is_written_since(path, started):
        return []
    records = [found for line in tail(path, LOG_BYTES) if (found := parse_object(line))]
    last = [record for record in records if LM_LOSS.name in record][-SLOW_INTERVALS:]
    shares = [record.get(STRAGGLER_SHARE.name) for record in last]
    hosts = {record.get(SLOWEST_HOST) for record in last}
    node = hosts.pop() if len(hosts) == 1 else None
    if len(last) < SLOW_INTERVALS or not isinstance(node, str) or not node or ", " in node:
        return []
    if not all(isinstance(share, int | float) and share >= SLOW_SHARE for share in shares):
        return []
    return [SickNode(node, SLOW, f"other ranks wait for it for {shares[-1]:.0%} of each iteration")]


def one_per_node(found: Iterable[SickNode]) -> list[SickNode]:
    """Return the first piece of evidence for each node."""
    nodes: dict[str, SickNode] = {}
    for sick in found:
        nodes.setdefault(sick.node, sick)
    return list(nodes.values())


def _is_written_since(path: Path, started: float) -> bool:
    """Return whether a file exists and was written since a time, in seconds since the epoch."""
    try:
        return path.stat().st_mtime >= started
    except OSError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none."""
    try:
        return parse_object(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError):
        return {}
