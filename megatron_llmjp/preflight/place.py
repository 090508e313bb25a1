"""Position of this node among the nodes of the check, from the launcher's variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_llmjp.errors import UserError
from megatron_llmjp.parallel.ranks import DEFAULT_PORT, find_ranks, single_process


@dataclass(frozen=True)
class Place:
    """Position of this node."""

    rank: int
    nodes: int
    address: tuple[str, int]
    """Host and port of the first node's store."""


def find_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """Return the position of this node.

    Returns:
        None if another process of this node checks it: under srun with several tasks per node, the
        first one does.

    Raises:
        UserError: another launcher started several processes per node.
    """
    ranks = find_ranks(env) or single_process()
    port = env.get("MASTER_PORT") or _own_port(env)
    if not port.isdigit():
        raise UserError(f"environment variable MASTER_PORT = '{port}': expected a number")
    address = (ranks.master_addr, int(port))
    if ranks.launcher != "srun" or "SLURM_NODEID" not in env:
        if ranks.local_rank:
            raise UserError(
                f"{ranks.launcher} started several processes on this node: start one per node "
                "(mpirun --map-by ppr:1:node, torchrun --nproc-per-node 1)"
            )
        return Place(ranks.rank, ranks.world_size, address)
    if ranks.local_rank:
        return None
    nodes = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or "1"
    return Place(int(env["SLURM_NODEID"]), int(nodes), address)


def _own_port(env: Mapping[str, str]) -> str:
    """Return a port of this job: several jobs may share a node."""
    job = env.get("SLURM_JOB_ID", "0")
    return str(20000 + int(job) % 10000) if job.isdigit() else DEFAULT_PORT
