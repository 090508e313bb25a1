"""CPU affinity of ranks, on a machine described by a fake /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_llmjp.parallel.cpu_affinity import (
    LocalRank,
    assign_cpus,
    bind_process,
    format_cpus,
    local_cpus,
    parse_cpus,
)
from megatron_llmjp.parallel.device import setup_rank
from tests.support.processes import run_ranks

ADDRESSES = [f"0000:{bus:02x}:00.0" for bus in (0x18, 0x2A, 0x3A, 0x5D, 0x9A, 0xAB, 0xBA, 0xDB)]


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Return the description of two sockets of 8 cores with two threads, and 4 GPUs each."""
    for cpu in range(32):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 16},{cpu % 16 + 16}\n")
    for gpu, address in enumerate(ADDRESSES):
        describe(tmp_path, address, node=gpu // 4, cpus=("0-7,16-23", "8-15,24-31")[gpu // 4])
    return tmp_path


def describe(sysfs: Path, address: str, node: int, cpus: str) -> None:
    folder = sysfs / "bus/pci/devices" / address
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "numa_node").write_text(f"{node}\n")
    (folder / "local_cpulist").write_text(f"{cpus}\n")


def ranks(*cpus: str, addresses: list[str] = ADDRESSES) -> list[LocalRank]:
    """Return ranks 8, 9, ... as those of a second machine."""
    pairs = zip(addresses, cpus, strict=False)
    return [LocalRank(8 + i, gpu, parse_cpus(own)) for i, (gpu, own) in enumerate(pairs)]


def shown(assigned: dict[int, frozenset[int]]) -> list[str]:
    return [format_cpus(assigned[rank]) for rank in sorted(assigned)]


def test_ranks_divide_the_cores_next_to_their_gpus(sysfs: Path):
    """Unbound ranks, and ranks that Slurm placed in the order of sockets, or in the first one."""
    expected = [f"{2 * i}-{2 * i + 1},{2 * i + 16}-{2 * i + 17}" for i in range(8)]
    assert shown(assign_cpus(ranks(*["0-31"] * 8), sysfs)) == expected
    cyclic = [expected[i // 2 + 4 * (i % 2)] for i in range(8)]
    assert shown(assign_cpus(ranks(*cyclic), sysfs)) == expected
    turned = [*reversed(ADDRESSES)]  # GPU 0 is next to the second socket
    assert shown(assign_cpus(ranks(*expected, addresses=turned), sysfs)) == [
        *expected[4:],
        *expected[:4],
    ]
    three = shown(assign_cpus(ranks("0-31", "0-31", "0-31"), sysfs))
    assert three == ["0-1,16-17", "2-4,18-20", "5-7,21-23"]


def test_cores_of_other_jobs_are_not_used(sysfs: Path):
    """The job has cores 4 to 11: the ranks of each socket share four."""
    allowed = ["4-11"] * 4
    addresses = [ADDRESSES[i] for i in (0, 1, 4, 5)]
    found = assign_cpus(ranks(*allowed, addresses=addresses), sysfs)
    assert shown(found) == ["4-5", "6-7", "8-9", "10-11"]


def test_nothing_changes_without_information(sysfs: Path):
    bound = ["0-3,16-19", "4-7,20-23"]
    assert assign_cpus(ranks(*bound), sysfs) == {}  # next to their GPUs already
    assert assign_cpus(ranks("0-31", "0-31", addresses=["", ""]), sysfs) == {}  # no GPU
    assert assign_cpus(ranks("0-31", "0-31", addresses=[ADDRESSES[0], "0000:ff:00.0"]), sysfs) == {}
    assert assign_cpus(ranks("8-15", "8-15"), sysfs) == {}  # no core next to the GPUs is allowed
    assert assign_cpus(ranks("0", "0", "0"), sysfs) == {}  # fewer cores than ranks
    first = [ADDRESSES[0], ADDRESSES[4]]
    assert assign_cpus(ranks("0-3", "4-8", addresses=first), sysfs) == {}  # one core in socket 1
    assert shown(assign_cpus(ranks("0-4", "5-9", addresses=first), sysfs)) == []  # two of five
    assert shown(assign_cpus(ranks("0-4", "5-11", addresses=first), sysfs)) == ["0-7", "8-11"]
    describe(sysfs, ADDRESSES[0], node=-1, cpus="0-31")  # a virtual machine
    assert local_cpus(ADDRESSES[0], sysfs) == frozenset()
    assert assign_cpus(ranks("0-31", "0-31"), sysfs) == {}
    assert assign_cpus([], sysfs) == {}


def test_lists_of_cpus():
    for text in ("", "0", "0-3", "0-3,8,10-11"):
        assert format_cpus(parse_cpus(text + "\n")) == text


def bind_with_a_thread(address: str) -> list[object]:
    """Bind a process that has a second thread; return the CPUs of both, and the GPU's address."""
    import threading
    from types import SimpleNamespace

    import torch

    released, numbers = threading.Event(), []
    thread = threading.Thread(
        target=lambda: (numbers.append(threading.get_native_id()), released.wait())
    )
    thread.start()
    while not numbers:
        pass
    bind_process(frozenset({min(os.sched_getaffinity(0))}))
    bind_process(frozenset({10_000}))  # no such CPU: nothing changes
    found = [sorted(os.sched_getaffinity(number)) for number in (0, numbers[0])]
    released.set()
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda _: None
    torch.cuda.get_device_name = lambda: "a GPU"
    ids = {"pci_domain_id": 0, "pci_bus_id": 0x9A, "pci_device_id": 0}
    addresses = []
    for properties in (SimpleNamespace(**ids), SimpleNamespace(uuid="GPU-1")):
        torch.cuda.get_device_properties = lambda _, properties=properties: properties
        addresses.append(setup_rank("auto", 0).pci_address)
    return [*found, addresses]


def test_all_threads_are_bound():
    cpu = min(os.sched_getaffinity(0))
    assert run_ranks(bind_with_a_thread, 1, "") == [[[cpu], [cpu], [ADDRESSES[4], ""]]]
