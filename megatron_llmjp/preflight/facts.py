"""What the check of one node found, and what the tests between nodes found; stored as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.preflight.link_faults import PairResult

NETWORK_FILE = "network.json"

Problem = tuple[str, str]
"""Kind and text. Problems of one kind on most nodes have a common cause."""


@dataclass
class NodeFacts:
    """Findings of one node."""

    node: str
    versions: dict[str, str] = field(default_factory=dict)
    """Versions and hardware models that must be equal on all nodes."""
    driver: str = ""
    """Version of the GPUs' driver; may differ between nodes."""
    clock: float | None = None
    """Seconds since the epoch, read on all nodes at the same moment."""
    device: str = ""
    """``cuda`` or ``cpu``, as the run would use; empty if it could not be determined."""
    devices: int = 1
    """GPUs that torch can use; 1 for ``cpu``."""
    problems: list[Problem] = field(default_factory=list)
    """Faults that need no comparison with other nodes."""
    gpus: list[dict[str, str | None]] = field(default_factory=list)
    """Rows of nvidia-smi."""
    nvlinks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """:class:`~.nvidia_smi.NvLinks` by GPU."""
    infiniband: dict[str, dict[str, Any]] = field(default_factory=dict)
    """:class:`~.infiniband.Port` by name."""
    gemm_tflops: list[float] = field(default_factory=list)
    """Throughput of each device."""
    all_reduce_gbs: float | None = None
    """Bus bandwidth between the GPUs of the node."""
    disk_gbs: float | None = None
    """Write speed of the save folder."""
    store_error: str = ""
    """Why this node could not take part in the tests between nodes."""

    def add(self, kind: str, *texts: str) -> None:
        """Record problems of a kind."""
        self.problems += [(kind, text) for text in texts]

    def can_communicate(self) -> bool:
        """Return whether this node has the devices that tests between nodes use."""
        return bool(self.device) and not any(kind == "device" for kind, _ in self.problems)

    def write(self, folder: Path) -> None:
        """Write the findings to the node's file."""
        write_atomically(folder / f"{self.node}.json", json.dumps(asdict(self)))


def node_facts(values: dict[str, Any]) -> NodeFacts:
    """Return the findings of a node from JSON."""
    facts = NodeFacts(**values)
    facts.problems = [(kind, text) for kind, text in facts.problems]
    return facts


@dataclass
class NetworkFacts:
    """Findings of the tests between nodes, by the coordinator on the first node."""

    nodes: int = 0
    """Number of nodes, including those that do not answer."""
    names: dict[int, str] = field(default_factory=dict)
    """Names of the nodes that answered, by rank."""
    facts: dict[str, NodeFacts] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    """Nodes that answered first, and when they stopped."""
    pairs: list[PairResult] = field(default_factory=list)
    """Tests of two nodes, in their order."""
    rounds: int = 0
    all_reduce: dict[str, Any] = field(default_factory=dict)
    """Of all fit nodes: ``nodes``, ``devices``, and ``gbs`` (bus bandwidth), ``error``, or
    ``silent``, the number of nodes that stopped answering."""
    incomplete: str = ""
    """Why tests are missing."""
    is_finished: bool = False
    """Whether the coordinator reached its end; false if the check was killed."""

    def write(self, folder: Path) -> None:
        """Write the findings so far."""
        write_atomically(folder / NETWORK_FILE, json.dumps(asdict(self)))


def read_network(folder: Path) -> NetworkFacts | None:
    """Read the findings between nodes; None if the coordinator did not write them."""
    try:
        values = json.loads((folder / NETWORK_FILE).read_text())
    except (OSError, ValueError):
        return None
    values["names"] = {int(rank): name for rank, name in values["names"].items()}
    values["facts"] = {name: node_facts(one) for name, one in values["facts"].items()}
    values["pairs"] = [
        PairResult((one["pair"][0], one["pair"][1]), one["error"], tuple(one["seconds"]))
        for one in values["pairs"]
    ]
    return NetworkFacts(**values)


def read_nodes(folder: Path) -> dict[str, NodeFacts]:
    """Read the files of all nodes that wrote one."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and "node" in values:
            found[values["node"]] = node_facts(values)
    return found
