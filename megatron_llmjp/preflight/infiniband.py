"""State and error counters of InfiniBand and RoCE ports, from sysfs.

Files: ``Documentation/ABI/stable/sysfs-class-infiniband`` of the Linux kernel.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path("/sys/class/infiniband")

COUNTERS = {"symbol_error": 10, "port_rcv_errors": 10, "link_error_recovery": 0, "link_downed": 0}
"""Error counters, with the increase during the check that a working link may have."""


@dataclass(frozen=True)
class Port:
    """One port of a host channel adapter."""

    state: str
    """``ACTIVE``, ``DOWN``, ``INIT``, ... of the link layer."""
    physical: str
    """``LinkUp``, ``Polling``, ``Disabled``, ..."""
    gigabits: float | None
    """Link rate in Gbit/s."""
    counters: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return a value that is serializable as JSON."""
        return asdict(self)


def read_ports(folder: Path = FOLDER) -> dict[str, Port]:
    """Read all ports of this node by name, such as ``mlx5_0/1``; empty without adapters."""
    ports = {}
    for path in sorted(folder.glob("*/ports/*")):
        rate = re.match(r"\d+(\.\d+)?", _read(path / "rate"))
        counters = {name: _read(path / "counters" / name) for name in COUNTERS}
        ports[f"{path.parent.parent.name}/{path.name}"] = Port(
            state=_read(path / "state").rpartition(": ")[2],
            physical=_read(path / "phys_state").rpartition(": ")[2],
            gigabits=float(rate[0]) if rate else None,
            counters={name: int(text) for name, text in counters.items() if text.isdecimal()},
        )
    return ports


def _read(path: Path) -> str:
    """Return the text of a file; empty if the driver does not have it or cannot read it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def counter_problems(before: dict[str, Port], after: dict[str, Port]) -> list[str]:
    """Return the ports whose error counters increased during the check."""
    problems = []
    for name, port in after.items():
        for counter, value in port.counters.items():
            old = before[name].counters.get(counter, 0) if name in before else value
            if value - old > COUNTERS[counter]:
                problems.append(f"{name}: {counter} increased by {value - old} during the check")
    return problems
