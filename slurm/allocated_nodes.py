"""Check that Slurm allocated no node that this job excludes.

Slurm refuses to change a job's nodes while it ends a job that lost a node (observed with 22.05):
the requeued job may get a sick node again. Exit code 3: requeue the job without the nodes in
``exclude``, which is done once in a row; otherwise it can start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm.node_review import add_arguments, reviewed_job

REQUEUE = 3
"""Exit code; not that of an error, after which the job would be requeued for ever."""
ALLOCATED_AGAIN = "allocated_again"
"""File in the folder of the logs of a start that ended because of this check."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the allocated nodes, and write those to exclude."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--logs", type=Path, required=True, help="folder of the logs of this start")
    add_arguments(parser)
    args = parser.parse_args(argv)
    job = reviewed_job(args)
    again = [node for node in job.write_excluded() if node in job.nodes]
    if not again:
        return 0
    names = ", ".join(again)
    if (_previous_start(args.logs) / ALLOCATED_AGAIN).exists():
        print(f"warning: Slurm allocated excluded nodes twice: {names}; using them", flush=True)
        return 0
    (args.logs / ALLOCATED_AGAIN).touch()
    print(f"Slurm allocated excluded nodes: {names}; requeued without them", flush=True)
    return REQUEUE


def _previous_start(logs: Path) -> Path:
    """Return the folder of the logs of the previous start, ``jobJOB_RESTART``."""
    job, _, restart = logs.name.rpartition("_")
    return logs.with_name(f"{job}_{int(restart) - 1}")


if __name__ == "__main__":
    sys.exit(main())
