"""Flags that describe the machine of a planned run: GPU type and memory, GPUs per node, MFU."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_llmjp.arguments import parse_size
from megatron_llmjp.errors import UserError

POSITIVE = ("mtbf_hours", "gpu_hour_price", "gpu_power")
NOT_NEGATIVE = ("restart_minutes", "queue_minutes")
SIZES = {
    "gpu_memory": "40GB or 80GiB",
    "write_bandwidth": "50GB, the bytes per second",
    "memory_bandwidth": "50GB, the bytes per second",
    "link_bandwidth": "50GB, the bytes per second",
    "network_bandwidth": "50GB, the bytes per second",
}
"""Flags that are sizes, with examples."""


@dataclass(frozen=True)
class PlannedMachine:
    """Machine that a run is estimated for."""

    world_size: int
    gpu: str = "H100"
    gpu_memory: float | None = None
    """In bytes; None for the memory of the GPU type."""
    gpus_per_node: int = 8
    mfu: float | None = None
    """Assumed model FLOPs utilization; None to compute the step time from its parts."""
    mtbf_hours: float | None = None
    """Mean time between failures of the job; None for the published one or the run's own."""
    restart_minutes: float = 10.0
    """From the start of a job to its first step."""
    queue_minutes: float = 5.0
    """From the end of a job to the start of the next one."""
    write_bandwidth: float | None = None
    """Of the file system of the checkpoints, in bytes per second; None for 1 GB/s per node."""
    memory_bandwidth: float | None = None
    """Of the GPU memory, in bytes per second, like the next two; None for that of the GPU type."""
    link_bandwidth: float | None = None
    """Between the GPUs of a node, per GPU and direction."""
    network_bandwidth: float | None = None
    """Between nodes, per GPU and direction."""
    scaling: tuple[int, ...] = ()
    """Numbers of GPUs to compare, in ascending order."""
    scaling_plot: str | None = None
    """File to draw their comparison to."""
    gpu_hour_price: float | None = None
    """Of one GPU for an hour, in any currency."""
    gpu_power: float | None = None
    """Watts of one GPU with its part of the node, network and cooling."""
    measured_runs: tuple[str, ...] = ()
    """Save folders of runs on the same machine, whose step times correct the predicted one."""

    def with_world_size(self, world_size: int) -> PlannedMachine:
        """Return the same machine with another number of GPUs."""
        return replace(self, world_size=world_size)


DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in fields(PlannedMachine) if field.name != "world_size"
}
"""Default values, by argument."""


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :data:`DEFAULTS`, with default None."""
    group = parser.add_argument_group("machine of a planned run")
    add = group.add_argument
    add("--world-size", type=int, metavar="N", help="number of processes (GPUs) of the planned run")
    add("--gpus", type=int, metavar="N", help="the same as --world-size")
    add("--gpu", metavar="NAME", help=f"GPU type, such as A100-40GB{_default('gpu')}")
    add(
        "--gpu-memory",
        metavar="SIZE",
        help="memory per GPU, such as 40GB (default: of the GPU type)",
    )
    add("--gpus-per-node", type=int, metavar="N", help=f"GPUs per node{_default('gpus_per_node')}")
    add(
        "--memory-bandwidth",
        metavar="SIZE",
        help="bytes per second of the GPU memory, such as 3350GB (default: of the GPU type)",
    )
    add(
        "--link-bandwidth",
        metavar="SIZE",
        help="bytes per second and direction between GPUs of a node (default: of the GPU type)",
    )
    add(
        "--network-bandwidth",
        metavar="SIZE",
        help="bytes per second and direction between nodes, per GPU, such as 50GB (default: of "
        "NVIDIA's reference system with the GPU type)",
    )
    add(
        "--mfu",
        type=float,
        metavar="X",
        help="assumed model FLOPs utilization (default: the step time is computed from its parts)",
    )
    add(
        "--mtbf-hours",
        type=float,
        metavar="X",
        help="mean time between failures of the job (default: of Llama 3, scaled to the number of "
        "GPUs, and of the run in --save)",
    )
    add(
        "--restart-minutes",
        type=float,
        metavar="X",
        help=f"time from the start of a job to its first step{_default('restart_minutes')}",
    )
    add(
        "--queue-minutes",
        type=float,
        metavar="X",
        help=f"time from the end of a job to the start of the next one{_default('queue_minutes')}",
    )
    add(
        "--write-bandwidth",
        metavar="SIZE",
        help="bytes per second that the file system of --save writes, such as 50GB (default: 1GB "
        "per node)",
    )
    add(
        "--scaling",
        metavar="N,N,...",
        help="with --suggest-layout: numbers of GPUs to compare, such as 64,128,256; prints step "
        "time, MFU, days, and cost and energy if their numbers are given",
    )
    add("--scaling-plot", metavar="FILE", help="with --scaling: also draw it, as PNG, SVG or PDF")
    add("--gpu-hour-price", type=float, metavar="X", help="price of one GPU for an hour")
    add(
        "--gpu-power",
        type=float,
        metavar="WATTS",
        help="power of one GPU with its part of the node, network and cooling",
    )
    add(
        "--measured-runs",
        nargs="+",
        metavar="SAVE",
        help="save folders of runs on the same machine, of ten steps or more: their measured step "
        "times correct the predicted one (default: the run in --save, once it has them)",
    )


def _default(name: str) -> str:
    return f" (default: {DEFAULTS[name]})"


def machine_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Return the given flags of :data:`DEFAULTS`."""
    return [f"--{name.replace('_', '-')}" for name in DEFAULTS if arguments[name] is not None]


def planned_processes(arguments: Mapping[str, Any]) -> int | None:
    """Return ``--world-size`` or ``--gpus``, the number of processes of the planned run.

    Raises:
        UserError: they differ, or are not positive.
    """
    given = {f"--{n.replace('_', '-')}": arguments[n] for n in ("world_size", "gpus")}
    given = {flag: number for flag, number in given.items() if number is not None}
    for flag, number in given.items():
        if number < 1:
            raise UserError(f"{flag} {number}: at least 1 process is needed")
    if len(set(given.values())) > 1:
        raise UserError(
            f"--world-size {given['--world-size']} and --gpus {given['--gpus']} are synonyms: "
            "pass one of them"
        )
    return next(iter(given.values()), None)


def planned_machine(
    arguments: Mapping[str, Any], flag: str, world_size: int | None
) -> PlannedMachine:
    """Return the machine that the arguments describe, for the mode of ``flag``.

    Raises:
        UserError: the number of processes is missing, or a value is out of range.
    """
    given = {
        name: default if arguments[name] is None else arguments[name]
        for name, default in DEFAULTS.items()
    }
    problems: list[str] = []
    given["scaling"] = _gpu_counts(arguments["scaling"], problems)
    given["measured_runs"] = tuple(given["measured_runs"])
    if given["scaling_plot"] and not arguments["scaling"]:
        problems.append("--scaling-plot requires --scaling")
    if world_size is None and given["scaling"]:
        world_size = given["scaling"][-1]
    if world_size is None and not problems:
        problems.append(f"{flag} needs --world-size N, the number of GPUs")
    if given["mfu"] is not None and not 0.0 < given["mfu"] <= 1.0:
        problems.append(f"--mfu {given['mfu']}: expected a fraction of the peak, such as 0.38")
    if given["mfu"] is not None and given["measured_runs"]:
        problems.append("--mfu and --measured-runs exclude each other: remove one of them")
    if given["gpus_per_node"] < 1:
        problems.append(f"--gpus-per-node {given['gpus_per_node']}: at least 1 GPU is needed")
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value, flag_name = given[name], f"--{name.replace('_', '-')}"
        # NaN is neither.
        if value is not None and not (value > 0 or (value == 0 and name in NOT_NEGATIVE)):
            problems.append(f"{flag_name} {value}: expected a positive number")
    given |= {name: _size(given[name], name, problems) for name in SIZES}
    if problems or world_size is None:
        raise UserError("\n".join(problems))
    return PlannedMachine(world_size, **given)


def _gpu_counts(text: str | None, problems: list[str]) -> tuple[int, ...]:
    """Return numbers of GPUs in ascending order; add a problem if the text is no list of them."""
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        problems.append(f"--scaling {text}: expected numbers of GPUs such as 64,128,256")
        return ()
    return tuple(sorted({int(word) for word in words}))


def _size(text: str | None, name: str, problems: list[str]) -> float | None:
    """Return a size in bytes; add a problem if it is not one."""
    if text is None:
        return None
    try:
        size = parse_size(text, default_unit="G")
    except ValueError:
        size = 0.0
    if not size:
        flag = f"--{name.replace('_', '-')}"
        problems.append(f"{flag} {text}: expected a size such as {SIZES[name]}")
    return size
