"""Comparison of the devices of all ranks, before process groups exist.

A rank on a CPU among ranks on GPUs would wait for them in gloo, and they for it in NCCL, until a
timeout that names neither. A rank without its GPU therefore joins the comparison first, and all
ranks end with the same message.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_llmjp.errors import RunError, UserError
from megatron_llmjp.formatting import format_ranks
from megatron_llmjp.parallel.cpu_affinity import (
    LocalRank,
    allowed_cpus,
    assign_cpus,
    bind_process,
    format_cpus,
    parse_cpus,
)
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.parallel.ranks import Ranks, node_name
from megatron_llmjp.parallel.rendezvous import all_gather_from_store

_KEY = "device"
_ON_CPU = "to train on the CPU, pass --device cpu"


@dataclass(frozen=True)
class RankDevice:
    """The device of a rank, as the other ranks see it."""

    rank: int
    host: str
    kind: str
    """``cuda`` or ``cpu``."""
    name: str
    uuid: str
    """Identity of the GPU; empty if not known."""
    problem: str
    """Why the rank cannot use the device that it should; empty if it can."""
    pci_address: str = ""
    """PCI address of the GPU; empty if not known."""
    cpus: str = ""
    """CPUs that the rank may use, such as ``0-3,8``."""


def check_devices(store: Any, ranks: Ranks, device: Device) -> list[RankDevice]:
    """Compare the devices of all ranks; a collective through the store.

    Args:
        store: key-value store shared by all ranks.
        ranks: rank and world size of this process.
        device: the device of this rank.

    Returns:
        The devices of all ranks, by rank.

    Raises:
        UserError: no rank has the GPU that it should, or ranks share a GPU.
        RunError: some ranks lack their GPU, as with a broken node: a restart elsewhere may succeed.
    """
    own = [node_name(), device.kind, device.name, device.uuid, device.problem]
    own += [device.pci_address, format_cpus(allowed_cpus())]
    found = all_gather_from_store(store, ranks, _KEY, own)
    devices = [RankDevice(rank, *fields) for rank, fields in enumerate(found)]
    compare_devices(devices)
    return devices


def describe_devices(devices: Iterable[RankDevice]) -> str:
    """Return the devices of a run: ``16 x NVIDIA H100 80GB HBM3 on 2 nodes``."""
    found = list(devices)
    names = Counter(device.name for device in found)
    nodes = len({device.host for device in found})
    text = ", ".join(f"{number} x {name}" for name, number in names.items())
    return f"{text} on {nodes} node{'s' if nodes > 1 else ''}"


def bind_to_local_cpus(devices: list[RankDevice], ranks: Ranks) -> None:
    """Bind this rank to its share of the CPUs next to its GPU, if the machine says which they are.

    Args:
        devices: result of :func:`check_devices`.
        ranks: rank and world size of this process.
    """
    host = devices[ranks.rank].host
    local = [
        LocalRank(device.rank, device.pci_address, parse_cpus(device.cpus))
        for device in devices
        if device.host == host
    ]
    cpus = assign_cpus(local).get(ranks.rank)
    if cpus is None:
        return
    bind_process(cpus)
    if ranks.is_first:
        print(f"note: each rank uses CPUs next to its GPU; rank 0: {format_cpus(cpus)}", flush=True)


def compare_devices(devices: list[RankDevice]) -> None:
    """Check the devices of all ranks of a run.

    Raises:
        UserError: no rank has the GPU that it should, or ranks share a GPU.
        RunError: some ranks lack their GPU, or ranks use different kinds of devices.
    """
    lacking = [device for device in devices if device.problem]
    if len(lacking) == len(devices):
        lines = "\n".join(_group((d.problem, d) for d in lacking))
        raise UserError(f"no GPU can be used:\n{lines}\n{_ON_CPU}")
    if lacking or len({device.kind for device in devices}) > 1:
        lines = "\n".join(_group(((d.problem or f"uses {d.name}"), d) for d in devices))
        raise RunError(
            "ranks have different devices, so that they cannot communicate:\n"
            f"{lines}\nrepair or exclude the machines without GPUs, or {_ON_CPU}"
        )
    _refuse_shared(devices)


def _refuse_shared(devices: list[RankDevice]) -> None:
    """Refuse two ranks on one GPU: NCCL does not support them.

    Raises:
        UserError: with the ranks, the machine, and its numbers of ranks and GPUs.
    """
    users: dict[tuple[str, str], list[int]] = defaultdict(list)
    for device in devices:
        if device.uuid:
            users[device.host, device.uuid].append(device.rank)
    for (host, uuid), sharing in users.items():
        if len(sharing) > 1:
            local = sum(device.host == host for device in devices)
            gpus = sum(machine == host for machine, _ in users)
            raise UserError(
                f"{format_ranks(sharing)} on {host} share one GPU ({uuid}): {local} ranks on this "
                f"machine use {gpus} GPU(s). Start one rank per GPU, and give every rank its own "
                "GPU or all GPUs of the machine (CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-node)"
            )


def _group(found: Iterable[tuple[str, RankDevice]]) -> list[str]:
    """Return a line for ranks with the same text: problems first, then the fewest ranks."""
    groups: dict[str, list[RankDevice]] = defaultdict(list)
    for text, device in found:
        groups[text].append(device)
    lines = []
    for text, members in sorted(groups.items(), key=lambda g: (not g[1][0].problem, len(g[1]))):
        hosts = sorted({member.host for member in members})
        more = f" and {len(hosts) - 4} more" if len(hosts) > 4 else ""
        ranks = format_ranks(member.rank for member in members)
        lines.append(f"  {ranks} on {', '.join(hosts[:4])}{more}: {text}")
    return lines
