"""Number of a job's nodes on which a run's layout is valid, with its global batch unchanged.

A job may get fewer nodes than its layout was made for, or spare ones. Tensor, pipeline and context
parallel sizes stay as configured; the data-parallel size changes, and with it neither the global
batch nor the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llmjp.config.layout_validation import data_parallel_size, layout_problems
from megatron_llmjp.config.schema import Config
from megatron_llmjp.formatting import format_names

MIN_USED_SHARE = 0.5
"""Smallest share of the nodes to start with: where fewer fit, the configuration is at fault."""


@dataclass(frozen=True)
class NodeChoice:
    """Nodes on which the ranks of a run start."""

    used: tuple[str, ...]
    idle: tuple[str, ...] = ()
    note: str = ""
    """Why nodes stay idle; empty if none does."""


def choose_nodes(config: Config, nodes: Sequence[str], ranks_per_node: int) -> NodeChoice:
    """Choose the first nodes of a job, as many as the layout can use.

    Args:
        config: the run's configuration.
        nodes: names of the usable nodes, in the order of the ranks.
        ranks_per_node: ranks on each node.

    Returns:
        The choice; all nodes if the layout is not valid on at least :data:`MIN_USED_SHARE` of
        them, for which :func:`~megatron_llmjp.config.validation.check_config` has the reason.
    """
    problems = list(layout_problems(config, len(nodes) * ranks_per_node))
    for count in range(len(nodes), math.ceil(MIN_USED_SHARE * len(nodes)) - 1, -1):
        world_size = count * ranks_per_node
        if any(layout_problems(config, world_size)):
            continue
        if not problems:
            return NodeChoice(tuple(nodes))
        idle = tuple(nodes[count:])
        note = (
            f"{count} of {len(nodes)} nodes are used, with data-parallel size "
            f"{data_parallel_size(config, world_size)}; {format_names(idle, 8)} "
            f"{'stays' if len(idle) == 1 else 'stay'} idle, because the layout does not fit "
            f"{len(nodes)} nodes: {problems[0]}"
        )
        return NodeChoice(tuple(nodes[:count]), idle, note)
    return NodeChoice(tuple(nodes))
