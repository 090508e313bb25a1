"""Start of a job: check the run once, and choose the nodes and CPUs of its ranks.

The checks are those of a rank at its start, and of ``--dry-run``, except for checksums of the
checkpoint, which the ranks share. The result is a file: the CPUs of each rank, then the nodes, one
per line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_llmjp.checkpoint.resume import add_stored_config
from megatron_llmjp.cli import check_model
from megatron_llmjp.config.flags import Command, parse
from megatron_llmjp.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from megatron_llmjp.estimate.usable_nodes import NodeChoice, choose_nodes
from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.placeholders import check_packages
from megatron_llmjp.run import resolve_run
from megatron_llmjp.start_checks import check_start


def main(argv: Sequence[str] | None = None) -> int:
    """Check the run, write the choice, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--nodes", required=True, help="usable nodes of the job, separated by commas")
    add("--tasks-per-node", type=int, required=True, help="ranks on each node")
    add("--cpus-per-task", type=int, default=1, help="CPUs that the job requested for each task")
    add("--cpus-per-node", default="", help="SLURM_JOB_CPUS_PER_NODE; empty if not known")
    add("--output", type=Path, required=True, help="file to write")
    add("arguments", nargs="*", help="arguments of pretrain_gpt.py, after --")
    args = parser.parse_args(argv)
    try:
        command = parse(args.arguments, add_stored_config=add_stored_config)
        choice = choose_nodes(command.config, args.nodes.split(","), args.tasks_per_node)
        check_run(command, len(choice.used) * args.tasks_per_node)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    cpus = cpus_per_task(args.cpus_per_task, args.tasks_per_node, args.cpus_per_node)
    _write(args.output, choice, cpus)
    return EXIT_DONE


def check_run(command: Command, world_size: int) -> None:
    """Check a run as its ranks do at their start; imports torch, which takes seconds.

    Raises:
        UserError: the error that all ranks would end with.
    """
    check_packages(command.config)
    run = resolve_run(command.config, world_size)
    check_start(run)
    check_model(run)


def cpus_per_task(requested: int, tasks_per_node: int, cpus_per_node: str) -> int:
    """Return the CPUs of each rank: its share of those that the job has on every node.

    With ``--exclusive`` a job has all CPUs of its nodes. If each task took only the requested ones,
    Slurm would place all ranks in the first socket, far from half of the GPUs.

    Args:
        requested: ``--cpus-per-task`` of the job.
        tasks_per_node: ranks on each node.
        cpus_per_node: ``SLURM_JOB_CPUS_PER_NODE``, such as ``112(x63),96``; empty if not known.
    """
    counts = [int(count) for count in re.findall(r"(?:^|,)(\d+)", cpus_per_node)]
    return max(requested, min(counts, default=0) // tasks_per_node)


def _write(path: Path, choice: NodeChoice, cpus: int) -> None:
    if choice.note:
        print(f"warning: {choice.note}", file=sys.stderr)
    write_atomically(path, "\n".join([str(cpus), *choice.used]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
