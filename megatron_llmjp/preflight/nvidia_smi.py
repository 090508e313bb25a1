"""State of GPUs and NVLinks of a node, parsed from the output of nvidia-smi.

Fields and formats: ``nvidia-smi --help-query-gpu`` and ``nvidia-smi nvlink -h``. Drivers differ in
the fields that they know; one that a driver refuses is dropped from the query. Values that a GPU
does not have, such as ``[N/A]``, are None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

GPU_FIELDS = (
    "index",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "memory.total",
    "name",
    "driver_version",
    "pcie.link.width.current",
    "temperature.gpu",
    "clocks.sm",
    "power.draw",
    "clocks_throttle_reasons.active",
    "clocks_event_reasons.active",
)
"""The last two are the former and the present name of one field."""

REMAPPED_FIELDS = ("gpu_bus_id", "remapped_rows.pending", "remapped_rows.failure")

MAX_USED_MIB = 2048
"""Memory of a GPU in use by the driver and other processes before the job starts."""

SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of ``clocks_event_reasons.active`` that are faults of power or cooling (``nvml.h``)."""

_UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field to query')
_LINK_GPU = re.compile(r"GPU (\d+):")
_LINK_STATE = re.compile(
    r"\s*Link (\d+): *(?:(\d+(?:\.\d+)?) GB/s|<?(?:inactive|disabled)>?)\s*$", re.IGNORECASE
)
_LINK_ERRORS = re.compile(r"\s*Link (\d+): *(\w[\w ]*?) Errors?: *(\d+)\s*$")

Row = dict[str, str | None]


def query(run: Callable[[Sequence[str]], str], option: str, fields: Sequence[str]) -> list[Row]:
    """Query fields of all GPUs.

    Args:
        run: runs a command and returns its output; raises ``RuntimeError`` with the output of one
            that fails.
        option: ``--query-gpu`` or ``--query-remapped-rows``.
        fields: names of the fields.

    Returns:
        The values by field, one row per GPU.

    Raises:
        RuntimeError: nvidia-smi fails.
    """
    known = list(fields)
    while True:
        command = ["nvidia-smi", f"{option}={','.join(known)}", "--format=csv,noheader,nounits"]
        try:
            return parse_rows(run(command), known)
        except RuntimeError as error:
            unknown = _UNKNOWN_FIELD.search(str(error))
            if unknown is None or unknown[1] not in known:
                raise
            known.remove(unknown[1])


def parse_rows(output: str, fields: Sequence[str]) -> list[Row]:
    """Parse CSV lines; missing and unsupported values are None."""
    rows = []
    for line in filter(str.strip, output.splitlines()):
        cells: list[str | None] = [_value(cell) for cell in line.split(",")]
        cells += [None] * (len(fields) - len(cells))
        rows.append(dict(zip(fields, cells, strict=False)))
    return rows


def _value(cell: str) -> str | None:
    text = cell.strip()
    return None if text.strip("[]").lower() in ("", "n/a", "not supported") else text


def number(value: str | None) -> float | None:
    """Return a value of nvidia-smi as a number; None if it is none."""
    try:
        return float(value) if value is not None else None
    except ValueError:
        return None


def gpu_problems(rows: Sequence[Row], expected: int) -> list[str]:
    """Return the faults of GPUs that need no comparison with others."""
    problems = [f"{len(rows)} of {expected} GPUs"] if len(rows) < expected else []
    for row in rows:
        used = number(row.get("memory.used"))
        errors = number(row.get("ecc.errors.uncorrected.volatile.total"))
        if used is not None and used > MAX_USED_MIB:
            problems.append(f"GPU {row.get('index')}: {used:.0f} MiB are used by another process")
        if errors:
            problems.append(f"GPU {row.get('index')}: {errors:.0f} uncorrected ECC errors")
    return problems


def remapping_problems(rows: Sequence[Row]) -> list[str]:
    """Return the GPUs whose memory waits for a reset to replace bad rows, or can no longer."""
    problems = []
    for row in rows:
        name = f"GPU {row.get('gpu_bus_id')}"
        if _is_set(row.get("remapped_rows.failure")):
            problems.append(f"{name}: remapping of a bad memory row failed; replace the GPU")
        elif _is_set(row.get("remapped_rows.pending")):
            problems.append(f"{name}: a bad memory row waits for a reset of the GPU")
    return problems


def _is_set(value: str | None) -> bool:
    return value is not None and value.lower() not in ("0", "no")


def slowdown_problems(rows: Sequence[Row]) -> list[str]:
    """Return the GPUs whose clock is reduced by faults of power or cooling."""
    problems = []
    for row in rows:
        active = row.get("clocks_event_reasons.active") or row.get("clocks_throttle_reasons.active")
        try:
            bits = int(active or "0", 16)
        except ValueError:
            continue
        reasons = [name for bit, name in SLOWDOWNS.items() if bits & bit]
        if reasons:
            problems.append(
                f"GPU {row.get('index')}: {', '.join(reasons)} ({row.get('temperature.gpu')} C, "
                f"{row.get('clocks.sm')} MHz, {row.get('power.draw')} W)"
            )
    return problems


@dataclass
class NvLinks:
    """NVLinks of one GPU."""

    active: int = 0
    inactive: list[int] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    """Sums over all links, by kind: ``Replay``, ``Recovery``, ``CRC``; since the driver started."""


def parse_nvlinks(status: str, errors: str) -> dict[int, NvLinks]:
    """Parse ``nvidia-smi nvlink --status`` and ``nvidia-smi nvlink -e``, by GPU."""
    found: dict[int, NvLinks] = {}
    gpu = None
    for line in status.splitlines() + errors.splitlines():
        if head := _LINK_GPU.match(line):
            gpu = found.setdefault(int(head[1]), NvLinks())
        elif gpu is None:
            continue
        elif state := _LINK_STATE.match(line):
            if state[2] and float(state[2]) > 0:
                gpu.active += 1
            else:
                gpu.inactive.append(int(state[1]))
        elif count := _LINK_ERRORS.match(line):
            gpu.errors[count[2]] = gpu.errors.get(count[2], 0) + int(count[3])
    return found


def nvlink_problems(before: dict[int, NvLinks], after: dict[int, NvLinks]) -> list[str]:
    """Return the GPUs with NVLink errors during the check. Corrected ones (CRC) are normal."""
    problems = []
    for gpu, links in after.items():
        for kind in ("Replay", "Recovery"):
            old = before[gpu].errors.get(kind, 0) if gpu in before else 0
            if (new := links.errors.get(kind, 0) - old) > 0:
                problems.append(f"GPU {gpu}: {new} NVLink {kind.lower()} errors during the check")
    return problems
