"""Preflight check of all nodes of a job: GPUs, save folder, clock, versions and network links.

``check`` runs once per node under srun and writes its result to a file; ``report`` reads the files
and prints unfit nodes. A node without a file did not respond.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_llmjp.config.model_config import DeviceChoice
from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.parallel.cuda_environment import set_driver_variables
from megatron_llmjp.parallel.ranks import find_ranks

MAX_LINK_RATIO = 2.0
"""Maximum transfer time of a node's links, relative to the median."""

CLOCK_SECONDS = 60.0
"""Maximum clock offset from the median; larger ones invalidate time stamps and certificates."""

MESSAGE_MIB = 64
"""Size of the message between neighboring nodes."""

LINK_TIMEOUT = timedelta(seconds=120)
"""Longest wait for another node."""


def main() -> int:
    """Run ``check`` or ``report``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("check", "report"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--save", type=Path, help="checkpoint folder")
    parser.add_argument("--gpus", type=int, default=0, help="expected GPUs per node")
    parser.add_argument(
        "--free-disk-gb", type=float, default=50.0, help="required free space of --save"
    )
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="of the run"
    )
    parser.add_argument("--nodes", help="report: all nodes of the job, separated by commas")
    args = parser.parse_args()
    return check(args) if args.command == "check" else report(args)


def node_name() -> str:
    """Return Slurm's name of this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check(args: argparse.Namespace) -> int:
    """Check this node, then its links, and write the result."""
    found: dict[str, Any] = {"node": node_name(), "clock": time.time(), "problems": []}
    found["versions"] = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    found["versions"]["python"] = sys.version.split()[0]
    found["problems"] += [*_save_folder(args), *_gpus(args, found)]
    device, problem = _find_device(args.device)
    found["problems"] += [problem] if problem else []
    _write_result(args.folder, found)
    try:
        found["link_seconds"] = _links(device, bool(problem))
    except Exception as error:  # any error of a broken network
        found["problems"].append(f"communication between nodes failed: {error}")
    _write_result(args.folder, found)
    return 0


def _write_result(folder: Path, found: dict[str, Any]) -> None:
    write_atomically(folder / f"{found['node']}.json", json.dumps(found))


def _save_folder(args: argparse.Namespace) -> list[str]:
    """Check that this node can write to the checkpoint folder, and its free space."""
    probe = args.save / f".preflight-{node_name()}"
    try:
        probe.write_bytes(os.urandom(1 << 20))
        readable = probe.stat().st_size == 1 << 20
        probe.unlink()
    except OSError as error:
        return [f"{args.save} cannot be written: {error.strerror}"]
    if not readable:
        return [f"{args.save} loses data: a test file is shorter than written"]
    free, required = shutil.disk_usage(args.save).free / 1e9, args.free_disk_gb
    if free < required:
        return [
            f"{args.save} has {free:.0f} GB free; {required:g} GB are required (PREFLIGHT_FREE_GB)"
        ]
    return []


def _gpus(args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """Check number, memory use and ECC errors of the GPUs; skipped without nvidia-smi.

    Model and memory are recorded with the versions, which must be equal on all nodes.
    """
    if args.gpus == 0 or shutil.which("nvidia-smi") is None:
        return []
    columns = "index,memory.used,ecc.errors.uncorrected.volatile.total,memory.total,name"
    query = ["nvidia-smi", f"--query-gpu={columns}"]
    done = subprocess.run([*query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    if done.returncode:
        return [f"nvidia-smi: {(done.stderr or done.stdout).strip()}"]
    rows = [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines()]
    problems = []
    if len(rows) < args.gpus:
        problems.append(f"{len(rows)} of {args.gpus} GPUs")
    found["versions"]["GPUs"] = ", ".join(sorted({f"{row[4]} {row[3]} MiB" for row in rows}))
    for index, used, errors, *_ in rows:
        if used.isdigit() and int(used) > 2048:
            problems.append(f"GPU {index}: {used} MiB are used by another process")
        if errors.isdigit() and int(errors) > 0:
            problems.append(f"GPU {index}: {errors} uncorrected ECC errors")
    return problems


def _find_device(choice: DeviceChoice) -> tuple[str, str]:
    """Return the kind of device that ranks of the run use on this node, and why they cannot."""
    set_driver_variables()
    from megatron_llmjp.parallel.visible_gpus import find_gpus

    gpus = find_gpus()
    return "cuda" if choice != "cpu" and gpus.count else "cpu", gpus.problem(choice)


def _links(kind: str, is_broken: bool) -> list[float]:
    """Return the shortest transfer times of a message to the next and from the previous node.

    An all-reduce takes the same time on all nodes and does not locate the slow one; transfers
    between neighbors do. Nothing is measured if a node lacks its GPUs, which is reported already.

    Args:
        kind: ``cuda`` or ``cpu``, the device of the run on this node.
        is_broken: whether this node lacks its GPUs.

    Raises:
        RuntimeError: nodes use different devices, or an all-reduce gave a wrong result.
    """
    import torch
    import torch.distributed as dist

    from megatron_llmjp.parallel.rendezvous import all_gather_from_store

    ranks = find_ranks()
    if ranks is None or ranks.world_size == 1:
        return []
    rank, world = ranks.rank, ranks.world_size
    address = (ranks.master_addr, int(ranks.master_port))
    store = dist.TCPStore(*address, world, is_master=ranks.is_first, timeout=LINK_TIMEOUT)
    nodes = all_gather_from_store(store, ranks, "device", [kind, is_broken], LINK_TIMEOUT)
    if any(broken for _, broken in nodes):
        return []
    kinds = [other for other, _ in nodes]
    if kind != (common := statistics.mode(kinds)):
        raise RuntimeError(f"this node uses {kind}, most nodes {common}")
    if len(set(kinds)) > 1:
        return []
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=dist.PrefixStore("links", store),
        rank=rank,
        world_size=world,
        timeout=LINK_TIMEOUT,
        device_id=device if kind == "cuda" else None,
    )
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    if int(total.item()) != world:
        raise RuntimeError(f"an all-reduce of ones over {world} nodes gave {int(total.item())}")
    message = torch.zeros(MESSAGE_MIB << 18, device=device)
    pairs = [(first, (first + 1) % world) for first in range(world)]
    mine = []
    for pair in pairs if world > 2 else pairs[:1]:
        if rank in pair:
            mine.append(min(_send(message, rank == pair[0], pair) for _ in range(3)))
        dist.barrier()
    dist.destroy_process_group()
    return mine


def _send(message: Any, sends: bool, pair: tuple[int, int]) -> float:
    import torch
    import torch.distributed as dist

    started = time.perf_counter()
    if sends:
        dist.send(message, pair[1])
        dist.recv(message[:1], pair[1])
    else:
        dist.recv(message, pair[0])
        dist.send(message[:1], pair[0])
    if message.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def report(args: argparse.Namespace) -> int:
    """Print the problems of each unfit node, and write the names of unfit nodes to a file."""
    names = args.nodes.split(",")
    found = {}
    for name in names:
        path = args.folder / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
    problems = find_unfit_nodes(names, found)
    for name, lines in problems.items():
        for line in lines:
            print(f"preflight: {name}: {line}", flush=True)
    (args.folder / "bad_nodes").write_text(",".join(problems))
    if problems:
        return 1
    links = [seconds for one in found.values() for seconds in one.get("link_seconds", [])]
    best = f"; slowest link {MESSAGE_MIB / 1e3 / max(links):.2f} GB/s" if links else ""
    print(f"preflight: {len(names)} nodes passed{best}", flush=True)
    return 0


def find_unfit_nodes(names: list[str], found: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return the problems of each unfit node."""
    problems: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        if name not in found:
            problems[name].append("no response")
        else:
            problems[name] += found[name]["problems"]
    links = {n: one["link_seconds"] for n, one in found.items() if one.get("link_seconds")}
    if links:
        median = statistics.median([seconds for both in links.values() for seconds in both])
        for name, both in links.items():
            if min(both) > MAX_LINK_RATIO * median:  # if only one is slow, it is the neighbor
                ratio = min(both) / median
                problems[name].append(
                    f"its links take {ratio:.1f} times the median of {median * 1e3:.0f} ms"
                )
    if found:
        clock = statistics.median([one["clock"] for one in found.values()])
        versions = [json.dumps(one["versions"], sort_keys=True) for one in found.values()]
        common_versions = statistics.mode(versions)
        for name, one in found.items():
            if abs(one["clock"] - clock) > CLOCK_SECONDS:
                problems[name].append(f"its clock is off by {one['clock'] - clock:+.0f} s")
            if json.dumps(one["versions"], sort_keys=True) != common_versions:
                problems[name].append(
                    f"its versions are {one['versions']}, those of most nodes {common_versions}"
                )
    return {name: lines for name, lines in problems.items() if lines}


if __name__ == "__main__":
    sys.exit(main())
