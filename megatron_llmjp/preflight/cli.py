"""Command line of the preflight check: one process per node, and the report of all nodes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
from collections.abc import Sequence
from dataclasses import fields
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_llmjp.errors import EXIT_USER_ERROR, UserError
from megatron_llmjp.preflight.place import Place, find_place
from megatron_llmjp.preflight.report import report
from megatron_llmjp.preflight.settings import Settings, Thresholds

DESCRIPTION = """Check the nodes of a job: GPUs, links, disk, clocks, versions.

Start one process per node: `srun --ntasks-per-node=1 slurm/preflight.py`. The first node prints a
table of all nodes and writes report.json. Exit code: 0 if all nodes are fit, 1 if some are not, 2
if most fail alike or for an error in the arguments. The commands `check` and `report` do one half
of it, for job scripts: a report is also possible if the first node does not answer. The thresholds
are in megatron_llmjp/preflight/settings.py."""


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
    for option in fields(Settings):
        flag, text = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        kind = type(option.default)
        add(flag, type=kind, default=option.default, help=f"{text} (default: %(default)s)")
    return parser


def _default_folder() -> Path:
    job = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return Path("-".join(["preflight", *filter(None, job)]))


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})


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
    from megatron_llmjp.preflight.local_checks import Expectations
    from megatron_llmjp.preflight.node_check import check_node

    place = find_place()
    if place is None:
        return 0
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {args.folder}: {error.strerror}") from None
    set_driver_variables()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch repeats every failed attempt
    settings = _settings(args)
    coordinator = _start_coordinator(place, args.folder, settings)
    expected = Expectations(args.save, args.free_disk_gb, args.gpus, args.device)
    check_node(place, args.folder, expected, settings, Thresholds())
    if coordinator is not None:
        coordinator.join(settings.total_seconds)
    if args.command == "check" or place.rank != 0:
        return 0
    return report(args.folder, _names(args.nodes), settings, Thresholds())


def _start_coordinator(place: Place, folder: Path, settings: Settings) -> BaseProcess | None:
    """Start the coordinator on the first of several nodes.

    Raises:
        UserError: it cannot serve the nodes.
    """
    from megatron_llmjp.preflight.coordinator import serve

    if place.rank or place.nodes == 1:
        return None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=serve, args=(place, folder, settings, Thresholds(), sender), daemon=True
    )
    process.start()
    sender.close()
    try:
        problem = receiver.recv()
    except EOFError:
        problem = "the coordinator of the check ended"
    if problem:
        raise UserError(f"{problem}. Set MASTER_ADDR to this node, MASTER_PORT to a free port")
    return process
