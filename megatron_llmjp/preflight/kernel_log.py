"""Hardware errors of GPUs (Xid messages) in the kernel log.

Codes: NVIDIA's "Xid Errors" catalog. Codes that an application causes (13, 31, 43, 45, ...) are
ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

HARDWARE_XIDS = {
    48: "double-bit ECC error",
    62: "halt of an internal microcontroller",
    64: "row remapping failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "high rate of single-bit ECC errors",
    94: "contained ECC error",
    95: "uncontained ECC error",
    119: "GSP timeout",
    120: "GSP error",
    140: "unrecovered ECC error",
}

_XID = re.compile(r"^\s*\[\s*(\d+(?:\.\d+)?)\]\s*NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", re.M)


@dataclass(frozen=True)
class Xid:
    """One Xid message."""

    uptime: float
    """Seconds from the start of the machine to the message."""
    bus_id: str
    code: int


def parse_xids(log: str) -> list[Xid]:
    """Return the Xid messages of the output of ``dmesg``, whose lines start with ``[seconds]``."""
    return [Xid(float(m[1]), m[2], int(m[3])) for m in _XID.finditer(log)]


def xid_problems(xids: Sequence[Xid], uptime: float, hours: float) -> list[str]:
    """Return the recent hardware errors, each code of a GPU once.

    Args:
        xids: messages since the start of the machine.
        uptime: seconds since then.
        hours: largest age of a message.
    """
    latest: dict[tuple[str, int], Xid] = {}
    for xid in xids:
        if xid.code in HARDWARE_XIDS and uptime - xid.uptime <= hours * 3600:
            latest[xid.bus_id, xid.code] = xid
    return [
        f"GPU {xid.bus_id}: Xid {xid.code} ({HARDWARE_XIDS[xid.code]}) "
        f"{(uptime - xid.uptime) / 3600:.1f} h ago"
        for xid in latest.values()
    ]
