"""Decision which sick nodes a job excludes, and where it continues.

A node is excluded on evidence against it. If the evidence is against many nodes, or moves with
the run from node to node, the cause is more likely the job itself: its container, a path, its code.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_llmjp.formatting import format_names
from megatron_llmjp.report.exclusions import EXCLUSION_LOG, Exclusion
from slurm.sick_nodes import HANG, LOST, SickNode

Action = Literal["requeue", "restart", "fewer"]


@dataclass(frozen=True)
class Limits:
    """Limits of the exclusions of a job."""

    max_share: float = 0.1
    """Largest share of the job's nodes that are excluded at a time; at least one of several."""
    hours: float = 24.0
    """Time after which an excluded node may be used again."""

    def max_nodes(self, nodes: int) -> int:
        """Return the largest number of excluded nodes for a job of some nodes."""
        return max(1, math.floor(self.max_share * nodes)) if nodes > 1 else 0


@dataclass(frozen=True)
class JobNodes:
    """Nodes of a job."""

    all: tuple[str, ...]
    """All nodes that the job had before any was lost."""
    needed: int
    """Number of nodes that the ranks use; the others are spare."""
    requested: int
    """Number of nodes that Slurm allocates to the job when it is requeued."""
    available: frozenset[str] = frozenset()
    """Nodes that it can get then, also those that other jobs have now; empty if unknown."""

    def can_start_without(self, names: Collection[str]) -> bool:
        """Return whether the job gets its nodes without some; else it would wait for ever."""
        return not self.available or len(self.available - set(names)) >= self.requested


@dataclass(frozen=True)
class Decision:
    """Nodes that a job excludes, and where it continues."""

    excluded: tuple[SickNode, ...] = ()
    healthy: tuple[str, ...] = ()
    """Nodes of the job to continue on, if it does not leave them."""
    action: Action = "requeue"
    """Requeue, or restart in this job: on as many nodes as before, or on fewer."""
    refusal: str = ""
    """Why nodes against which there is evidence are not excluded."""


def decide_exclusions(
    sick: Sequence[SickNode], job: JobNodes, earlier: Sequence[Exclusion], limits: Limits
) -> Decision:
    """Decide which nodes a job excludes.

    Args:
        sick: nodes with evidence against them, one entry per node.
        job: the nodes of the job.
        earlier: exclusions of this job that still apply.
        limits: limits of the exclusions.
    """
    found = {node.node: node for node in sick if node.node in job.all}
    if not found:
        return Decision(healthy=job.all)
    # A node that starts no task at all cannot be used, and the job cannot be the cause.
    judged = [node for node in found.values() if node.kind != LOST]
    refusal = _own_mistake(judged, job, earlier, limits)
    left = {name: node for name, node in found.items() if node.kind == LOST or not refusal}
    excluded = tuple(left.values())
    healthy = tuple(name for name in job.all if name not in left)
    action: Action = "requeue"
    if left and len(healthy) >= job.needed:
        action = "restart"
    elif left and healthy and not job.can_start_without({*left, *(one.node for one in earlier)}):
        action = "fewer"
    return Decision(excluded, healthy, action, refusal)


def _own_mistake(
    sick: Sequence[SickNode], job: JobNodes, earlier: Sequence[Exclusion], limits: Limits
) -> str:
    """Return why the evidence is more likely against the job than against its nodes, or nothing."""
    names = {node.node for node in sick}
    before_names = {other.node for other in earlier if other.kind != LOST}
    total, most = len(names | before_names), limits.max_nodes(len(job.all))
    if sick and total > most:
        before = f", {total - len(names)} other excluded before" if total > len(names) else ""
        return (
            f"{len(names)} of {len(job.all)} nodes seem sick{before}, more than {most} "
            f"(MAX_EXCLUDED_SHARE={limits.max_share:g}): the cause may be the job itself, its "
            f"container, paths or network settings. {sick[0].node}: {sick[0].reason}"
        )
    for node in sick:
        for other in earlier:
            again = node.kind == other.kind == HANG and node.iteration == other.iteration
            if again and node.node != other.node:
                return (
                    f"the run hung at iteration {node.iteration} on {other.node} before, and now "
                    f"on {node.node}: the cause is more likely the run than these nodes"
                )
    return ""


def still_excluded(
    exclusions: Sequence[Exclusion], job: str, limits: Limits, now: float
) -> list[Exclusion]:
    """Return the last exclusion of each node that a job still excludes, oldest first."""
    recent = [e for e in exclusions if e.job == job and now - e.time < 3600 * limits.hours]
    return sorted({e.node: e for e in recent}.values(), key=lambda e: e.time)


def excluded_names(
    users: Sequence[str], earlier: Sequence[Exclusion], job: JobNodes
) -> tuple[list[str], list[str]]:
    """Return the nodes for Slurm to exclude from a job, and those that it needs nevertheless.

    Args:
        users: nodes that the user excludes.
        earlier: exclusions of this job that still apply, oldest first.
        job: the nodes of the job.
    """
    names, needed = [one.node for one in earlier if one.node not in users], []
    for node in list(names):
        if job.can_start_without(names):
            break
        if node in job.available:
            names.remove(node)
            needed.append(node)
    return [*users, *names], needed


def record_exclusions(
    save: Path, excluded: Sequence[SickNode], job: str, iteration: int
) -> list[Exclusion]:
    """Append exclusions to their log in the save folder, and return them.

    Raises:
        OSError: the log cannot be written.
    """
    found = [
        Exclusion(
            node.node,
            node.reason,
            node.kind,
            time.time(),
            job,
            iteration if node.iteration is None else node.iteration,
        )
        for node in excluded
    ]
    with (save / EXCLUSION_LOG).open("a", encoding="utf-8") as stream:
        for one in found:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.time))
            stream.write(json.dumps({"date": when, **vars(one)}) + "\n")
    return found


def describe(decision: Decision) -> list[str]:
    """Return lines for the job's log."""
    lines = [f"{node.node} is excluded: {node.reason}" for node in decision.excluded]
    if decision.refusal:
        lines.append(f"no node is excluded: {decision.refusal}")
    if decision.action != "requeue":
        lines.append(
            f"continuing in this job on {len(decision.healthy)} nodes: "
            f"{format_names(decision.healthy, 8)}"
        )
    return lines
