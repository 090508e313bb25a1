"""Command line of the preflight check: one process per node, and the report of all nodes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_llmjp.errors import EXIT_USER_ERROR, UserError
from megatron_llmjp.parallel.ranks import find_ranks, single_process
from megatron_llmjp.preflight.report import report
from megatron_llmjp.preflight.settings import Settings, Thresholds

DESCRIPTION = """Check the nodes of a job: GPUs, links, disk, clocks, versions.

Start one process per node: `srun --ntasks-per-node=1 slurm/preflight.py`. The first node prints a
table of all nodes and writes report.json. Exit code: 0 if all nodes are fit, 1 if some are not, 2
if most fail alike or for an error in the arguments. The commands `check` and `report` do one half
of it, for job scripts: a report is also possible if the first node does not answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "report":
            return report(args.folder, _names(args.nodes), _settings(args), Thresholds())
        return _check(args)
    except UserError as error:
        print(f"error: {error}", flush=True)
        return EXIT_USER_ERROR


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=formatter)
    add = parser.add_argument
    add("command", nargs="?", choices=("check", "report"), help="default: both")
    add("--folder", type=Path, default=_default_folder(), help="folder of the result files")
    add("--save", type=Path, help="checkpoint folder, to check its disk")
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    add("--gpus", type=int, default=int(gpus) if gpus.isdigit() else 0, help="GPUs per node")
    add("--free-disk-gb", type=float, default=50.0, help="required free space of --save")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="device of the run")
    add("--nodes", help="all nodes of the job, comma-separated; default: from Slurm")
    settings = Settings()
    add("--time-limit", type=float, default=settings.total_seconds, help="seconds of the check")
    add("--answer-seconds", type=float, default=settings.answer_seconds, help="wait for a node")
    add("--link-seconds", type=float, default=settings.link_seconds, help="limit of one link test")
    add("--disk-mib", type=int, default=settings.disk_mib, help="size of the test file in --save")
    return parser


def _default_folder() -> Path:
    job = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return Path("-".join(["preflight", *filter(None, job)]))


def _settings(args: argparse.Namespace) -> Settings:
    return replace(
        Settings(),
        total_seconds=args.time_limit,
        answer_seconds=args.answer_seconds,
        link_seconds=args.link_seconds,
        disk_mib=args.disk_mib,
    )


def _names(nodes: str | None) -> list[str]:
    """Return the given nodes, or those of the Slurm job."""
    listed = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes or not listed:
        return nodes.split(",") if nodes else []
    try:
        command = ["scontrol", "show", "hostnames", listed]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []  # in a container without Slurm: the nodes that answer


def _check(args: argparse.Namespace) -> int:
    """Check this node; without a command, the first node also reports."""
    from megatron_llmjp.parallel.cuda_environment import set_driver_variables
    from megatron_llmjp.preflight.coordinator import serve
    from megatron_llmjp.preflight.local_checks import Expectations
    from megatron_llmjp.preflight.node_check import Place, check_node

    rank, nodes, address = find_place()
    if rank is None:
        return 0
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {args.folder}: {error.strerror}") from None
    set_driver_variables()
    place, settings = Place(rank, nodes, address), _settings(args)
    coordinator = None
    if rank == 0 and nodes > 1:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        coordinator = context.Process(
            target=serve, args=(place, args.folder, settings, Thresholds(), sender), daemon=True
        )
        coordinator.start()
        if problem := receiver.recv():
            raise UserError(f"{problem}. Set MASTER_PORT to a free port")
    expected = Expectations(args.save, args.free_disk_gb, args.gpus, args.device)
    check_node(place, args.folder, expected, settings, Thresholds())
    if coordinator is not None:
        coordinator.join(settings.total_seconds)
    if args.command == "check" or rank != 0:
        return 0
    return report(args.folder, _names(args.nodes), settings, Thresholds())


def find_place(env: Mapping[str, str] = os.environ) -> tuple[int | None, int, tuple[str, int]]:
    """Return the number of this node, the number of nodes, and host and port of the first.

    Under srun with several tasks per node only the first task of a node checks it: for the others,
    the number is None.

    Raises:
        UserError: another launcher started several processes per node.
    """
    ranks = find_ranks(env) or single_process()
    port = int(env["MASTER_PORT"] if env.get("MASTER_PORT") else _own_port(env))
    address = (ranks.master_addr, port)
    if ranks.launcher != "srun" or "SLURM_NODEID" not in env:
        if ranks.local_rank:
            raise UserError(
                f"{ranks.launcher} started several processes on this node: start one per node "
                "(mpirun --map-by ppr:1:node, torchrun --nproc-per-node 1)"
            )
        return ranks.rank, ranks.world_size, address
    nodes = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or "1"
    return None if ranks.local_rank else int(env["SLURM_NODEID"]), int(nodes), address


def _own_port(env: Mapping[str, str]) -> int:
    """Return a port of this job: several jobs may share a node."""
    job = env.get("SLURM_JOB_ID", "0")
    return 20000 + int(job) % 10000 if job.isdigit() else 29500
