"""Looks at every node of a job before training: is it fit, and is it as fast as the others?

`check` runs once per node under srun and leaves a file with what it found; `report` reads the files
and says which nodes are unfit. A node without a file did not even answer.
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

from megatron_llmjp.filesystem import write_atomically

SLOWEST = 2.0
"""Times the median that a node's link may take."""

CLOCK_SECONDS = 60.0
"""Clocks further apart spoil time stamps, and certificates."""

MEGABYTES = 64
"""What neighbours send each other."""


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "report"))
    parser.add_argument("--folder", type=Path, required=True, help="where the nodes' files go")
    parser.add_argument("--save", type=Path, help="folder of the checkpoints")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that every node should have")
    parser.add_argument("--free-disk-gb", type=float, default=50.0)
    parser.add_argument("--nodes", help="check: all nodes that should answer, with commas")
    args = parser.parse_args()
    return check(args) if args.what == "check" else report(args)


def node_name() -> str:
    """The name Slurm knows this node by."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check(args: argparse.Namespace) -> int:
    """Look at this node, then at its links, and leave what was found."""
    found: dict[str, Any] = {"node": node_name(), "clock": time.time(), "problems": []}
    found["versions"] = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    found["versions"]["python"] = sys.version.split()[0]
    found["problems"] += [*_save_folder(args), *_gpus(args, found)]
    _leave(args.folder, found)
    try:
        found["link_seconds"] = _links(args.gpus)
    except Exception as error:  # whatever a broken network raises
        found["problems"].append(f"the nodes cannot talk to each other: {error}")
    _leave(args.folder, found)
    return 0


def _leave(folder: Path, found: dict[str, Any]) -> None:
    write_atomically(folder / f"{found['node']}.json", json.dumps(found))


def _save_folder(args: argparse.Namespace) -> list[str]:
    """Whether this node can write where checkpoints go, and how much fits."""
    probe = args.save / f".preflight-{node_name()}"
    try:
        probe.write_bytes(os.urandom(1 << 20))
        readable = probe.stat().st_size == 1 << 20
        probe.unlink()
    except OSError as error:
        return [f"{args.save} cannot be written: {error.strerror}"]
    if not readable:
        return [f"{args.save} does not keep what is written to it"]
    free, wanted = shutil.disk_usage(args.save).free / 1e9, args.free_disk_gb
    if free < wanted:
        return [f"{args.save} has {free:.0f} GB left of the {wanted:g} wanted (PREFLIGHT_FREE_GB)"]
    return []


def _gpus(args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """Whether all GPUs are there, work, and are empty; nothing without the driver's tool.

    Their kind and memory go to the versions, which are the same on all nodes.
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
        problems.append(f"{len(rows)} GPUs of {args.gpus}")
    found["versions"]["GPUs"] = ", ".join(sorted({f"{row[4]} {row[3]} MiB" for row in rows}))
    for index, used, errors, *_ in rows:
        if used.isdigit() and int(used) > 2048:
            problems.append(f"GPU {index} holds {used} MiB of somebody else")
        if errors.isdigit() and int(errors) > 0:
            problems.append(f"GPU {index} has {errors} uncorrected memory errors")
    return problems


def _links(gpus: int) -> list[float]:
    """Seconds for a message to the next node and for one from the node before, at their best.

    A sum over all nodes takes the same time everywhere and tells nothing about which is slow; the
    link between two neighbours does.
    """
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    if world == 1:
        return []
    cuda = gpus > 0 and torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    if int(total.item()) != world:
        raise RuntimeError(f"a sum over {world} nodes gave {int(total.item())}")
    message = torch.zeros(MEGABYTES << 18, device=device)
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
    """Say what is wrong where; the names of unfit nodes go to a file."""
    names = args.nodes.split(",")
    found = {}
    for name in names:
        path = args.folder / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
    problems = judge(names, found)
    for name, why in problems.items():
        for line in why:
            print(f"preflight: {name}: {line}", flush=True)
    (args.folder / "bad_nodes").write_text(",".join(problems))
    if problems:
        return 1
    links = [seconds for one in found.values() for seconds in one.get("link_seconds", [])]
    best = f"; slowest link {MEGABYTES / 1e3 / max(links):.2f} GB/s" if links else ""
    print(f"preflight: {len(names)} nodes are fit{best}", flush=True)
    return 0


def judge(names: list[str], found: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What is wrong with each unfit node."""
    problems: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        if name not in found:
            problems[name].append("no answer")
        else:
            problems[name] += found[name]["problems"]
    links = {n: one["link_seconds"] for n, one in found.items() if one.get("link_seconds")}
    if links:
        usual = statistics.median([seconds for both in links.values() for seconds in both])
        for name, both in links.items():
            if min(both) > SLOWEST * usual:  # one slow link alone is the neighbour's
                problems[name].append(
                    f"its links take {min(both) / usual:.1f} times the usual {usual * 1e3:.0f} ms"
                )
    if found:
        clock = statistics.median([one["clock"] for one in found.values()])
        versions = [json.dumps(one["versions"], sort_keys=True) for one in found.values()]
        usual_versions = statistics.mode(versions)
        for name, one in found.items():
            if abs(one["clock"] - clock) > CLOCK_SECONDS:
                problems[name].append(f"its clock is {one['clock'] - clock:+.0f} s off")
            if json.dumps(one["versions"], sort_keys=True) != usual_versions:
                problems[name].append(f"{one['versions']}, the others {usual_versions}")
    return {name: why for name, why in problems.items() if why}


if __name__ == "__main__":
    sys.exit(main())
