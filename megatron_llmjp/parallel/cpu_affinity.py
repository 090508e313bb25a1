"""CPU affinity of ranks: the cores of the NUMA node of each rank's GPU. Without torch.

A job scheduler gives each rank some cores, often without knowing which GPU the rank uses. The ranks
of a machine divide again the cores that they have together, so that each uses cores next to its
GPU: those of ``local_cpulist`` in the kernel's description of the PCI device. Without that
information nothing changes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.formatting import format_ranges

SYSFS = Path("/sys")


@dataclass(frozen=True)
class LocalRank:
    """A rank of this machine."""

    rank: int
    pci_address: str
    """Of its GPU, such as ``0000:18:00.0``; empty without a GPU, or if not known."""
    cpus: frozenset[int]
    """CPUs (hardware threads) that it may use."""


def assign_cpus(ranks: Sequence[LocalRank], sysfs: Path = SYSFS) -> dict[int, frozenset[int]]:
    """Divide the CPUs that the ranks of a machine may use, by the NUMA nodes of their GPUs.

    Ranks whose GPUs are next to the same CPUs get equal shares of whole cores, in their order.

    Args:
        ranks: all ranks of the machine, in their order.
        sysfs: where the kernel describes the machine.

    Returns:
        The CPUs of each rank; empty if nothing should change: the machine does not say which CPUs
        are next to a GPU, none of these is allowed, there are fewer cores than ranks, or the ranks
        are already bound, each to CPUs of its own, and these are next to their GPUs or more than
        twice as many.
    """
    allowed = frozenset[int]().union(*(rank.cpus for rank in ranks))
    near = {rank.rank: local_cpus(rank.pci_address, sysfs) & allowed for rank in ranks}
    are_bound = sum(len(rank.cpus) for rank in ranks) == len(allowed)
    if are_bound and all(rank.cpus <= near[rank.rank] for rank in ranks):
        return {}
    found: dict[int, frozenset[int]] = {}
    for cpus in set(near.values()):
        sharing = [rank.rank for rank in ranks if near[rank.rank] == cpus]
        cores = _cores(cpus, sysfs)
        if len(cores) < len(sharing):
            return {}
        for place, rank in enumerate(sharing):
            first, end = (len(cores) * n // len(sharing) for n in (place, place + 1))
            found[rank] = frozenset[int]().union(*cores[first:end])
    # The job may have most of its CPUs in one socket: a few near ones are worse than many others.
    if are_bound and any(2 * len(found[rank.rank]) < len(rank.cpus) for rank in ranks):
        return {}
    return found


def local_cpus(pci_address: str, sysfs: Path = SYSFS) -> frozenset[int]:
    """Return the CPUs next to a PCI device; empty if not known.

    ``numa_node`` is -1 on machines that do not describe their NUMA nodes; ``local_cpulist`` then
    has all CPUs, or none.
    """
    folder = sysfs / "bus/pci/devices" / pci_address
    with contextlib.suppress(OSError, ValueError):
        if pci_address and int((folder / "numa_node").read_text()) >= 0:
            return parse_cpus((folder / "local_cpulist").read_text())
    return frozenset()


def _cores(cpus: frozenset[int], sysfs: Path) -> list[frozenset[int]]:
    """Group CPUs by physical core: hardware threads of one core belong to one rank."""
    cores = set()
    for cpu in cpus:
        threads = frozenset({cpu})
        with contextlib.suppress(OSError, ValueError):
            path = sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            threads = (parse_cpus(path.read_text()) | {cpu}) & cpus
        cores.add(threads)
    return sorted(cores, key=min)


def parse_cpus(text: str) -> frozenset[int]:
    """Parse the kernel's list of CPUs, such as ``0-3,8``.

    Raises:
        ValueError: it is malformed.
    """
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def format_cpus(cpus: Iterable[int]) -> str:
    """Format CPUs as the kernel does: ``0-3,8``."""
    return ",".join(format_ranges(cpus))


def allowed_cpus() -> frozenset[int]:
    """Return the CPUs that this process may use; empty if the system does not say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def bind_process(cpus: frozenset[int]) -> None:
    """Let all threads of this process, and processes that it starts, use only ``cpus``.

    A CPU set of the job that excludes them has precedence: then nothing changes.
    """
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # excluded by a CPU set, or the thread has ended
            os.sched_setaffinity(int(thread.name), cpus)
