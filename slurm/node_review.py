"""Review of a job's nodes after its preflight or its ranks ended: evidence, decision, records."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_llmjp.report.exclusions import Exclusion, read_exclusions
from slurm.exclusions import (
    Decision,
    JobNodes,
    Limits,
    decide_exclusions,
    excluded_names,
    record_exclusions,
    still_excluded,
)
from slurm.job_nodes import SlurmJob
from slurm.sick_nodes import (
    LOST,
    SILENT,
    SickNode,
    failed_gpus,
    hung_nodes,
    one_per_node,
    slow_nodes,
    unfit_nodes,
)
from slurm.this_job import job_id

HEALTHY_NODES = "healthy_nodes"
"""File with the nodes to restart on, one per line, in the folder of the logs."""
EXCLUDE = "exclude"
"""File with the nodes that Slurm excludes from the requeued job, separated by commas."""
TIME_LIMIT = "time_limit"
"""File that ``guard.sh`` creates when Slurm signals that the job's time limit is near."""


@dataclass(frozen=True)
class NodeReview:
    """Evidence against nodes of a job, and the decision about them."""

    decision: Decision
    sick: tuple[SickNode, ...] = ()
    common: str = ""
    """A cause that concerns no single node."""

    @property
    def lost(self) -> set[str]:
        """Nodes that Slurm removed from the job, and excluded ones that do not respond."""
        silent = {node.node for node in self.decision.excluded if node.kind == SILENT}
        return silent | {node.node for node in self.sick if node.kind == LOST}


@dataclass(frozen=True)
class ReviewedJob:
    """A start of a job whose nodes are reviewed."""

    save: Path
    logs: Path
    """Folder of the logs of this start."""
    nodes: tuple[str, ...]
    rank_nodes: tuple[str, ...]
    """Nodes of the ranks, in the order of the ranks."""
    ranks_per_node: int
    started: float
    """Start of the ranks, in seconds since the epoch."""
    excludes: bool
    """Whether sick nodes are excluded."""
    limits: Limits
    id: str
    """Job id."""
    requested: int
    """Number of nodes that the job had at its start, and gets when it is requeued."""

    @property
    def slurm(self) -> SlurmJob:
        """The job in Slurm."""
        return SlurmJob(self.id, self.logs)

    def review(self, code: int, preflight: bool) -> NodeReview:
        """Find evidence against nodes, and decide which are excluded.

        Args:
            code: exit code of the ranks or of the preflight check.
            preflight: whether preflight failed.
        """
        sick, common = self._evidence(code, preflight)
        if not sick or not self.excludes:
            refusal = "EXCLUDE_BAD_NODES=0" if sick else ""
            return NodeReview(Decision(healthy=self.nodes, refusal=refusal), tuple(sick), common)
        exclusions = read_exclusions(self.save)
        _, nodes = self._job_nodes(exclusions)
        decision = decide_exclusions(sick, nodes, self._earlier(exclusions), self.limits)
        if code == EXIT_REQUEUE or (self.logs / TIME_LIMIT).exists():
            # Slurm signals once: ranks that restart now would not stop before the time limit.
            decision = replace(decision, action="requeue")
        return NodeReview(decision, tuple(sick), common)

    def _earlier(self, exclusions: Sequence[Exclusion]) -> Sequence[Exclusion]:
        return still_excluded(exclusions, self.id, self.limits, time.time())

    def _job_nodes(self, exclusions: Sequence[Exclusion]) -> tuple[list[str], JobNodes]:
        """Return the nodes that the user excludes, and those of the job."""
        ours = {one.node for one in exclusions if one.job == self.id}
        users = [node for node in self.slurm.excluded() if node not in ours]
        available = frozenset(self.slurm.usable_nodes() - set(users))
        return users, JobNodes(self.nodes, len(self.rank_nodes), self.requested, available)

    def _evidence(self, code: int, preflight: bool) -> tuple[list[SickNode], str]:
        """Return the nodes that seem sick, and a cause that concerns no single node."""
        if preflight:
            unfit, common = unfit_nodes(self.logs)
            lost = self.slurm.lost_nodes(self.nodes) if unfit and not common else []
            return one_per_node([*lost, *unfit]), common
        if code in (EXIT_DONE, EXIT_USER_ERROR):
            return [], ""
        found = []
        if code != EXIT_REQUEUE:
            found += self.slurm.lost_nodes(self.nodes)
            found += failed_gpus(self.logs, self.rank_nodes, self.ranks_per_node)
            found += hung_nodes(self.save, self.started)
        return one_per_node([*found, *slow_nodes(self.save, self.started)]), ""

    def prepare_restart(self, review: NodeReview) -> None:
        """Write the nodes to restart on, and give up lost ones.

        Raises:
            OSError: the file cannot be written.
        """
        lines = "".join(f"{node}\n" for node in review.decision.healthy)
        (self.logs / HEALTHY_NODES).write_text(lines)
        self._give_up(review)

    def prepare_requeue(self, review: NodeReview) -> None:
        """Write the nodes that Slurm excludes from the requeued job, and give up lost ones.

        Raises:
            OSError: the file cannot be written.
        """
        self.write_excluded()
        self._give_up(review)

    def write_excluded(self) -> Sequence[str]:
        """Write the nodes that Slurm is to exclude from this job, and return them.

        Raises:
            OSError: the file cannot be written.
        """
        exclusions = read_exclusions(self.save)
        if not any(one.job == self.id for one in exclusions):
            return ()  # Slurm excludes those of the user already
        users, nodes = self._job_nodes(exclusions)
        names, needed = excluded_names(users, self._earlier(exclusions), nodes)
        if needed:
            print(f"no longer excluded, since no other nodes are left: {', '.join(needed)}")
        (self.logs / EXCLUDE).write_text(",".join(names))
        return names

    def _give_up(self, review: NodeReview) -> None:
        """Give up lost nodes: Slurm may end the job, or start it without GPUs, on one of them."""
        if review.lost:
            self.slurm.keep_only([node for node in self.nodes if node not in review.lost])

    def record(self, review: NodeReview, iteration: int) -> Sequence[SickNode]:
        """Record the excluded nodes, and return them.

        Raises:
            OSError: the log of the exclusions cannot be written.
        """
        record_exclusions(self.save, review.decision.excluded, self.id, iteration)
        return review.decision.excluded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a start of a job."""
    add = parser.add_argument
    add("--nodes", type=_names, default=(), help="nodes of the job, separated by commas")
    add("--rank-nodes", type=_names, default=(), help="nodes of the ranks, in their order")
    add("--ranks-per-node", type=int, default=1, help="ranks on each node")
    add("--started", type=float, default=0.0, help="start of the ranks, seconds since the epoch")
    add("--exclude-bad-nodes", type=int, choices=(0, 1), default=1, help="1 to exclude sick nodes")
    add("--max-excluded-share", type=float, default=Limits.max_share, help="of the job's nodes")
    add("--exclude-hours", type=float, default=Limits.hours, help="how long a node is excluded")


def reviewed_job(args: argparse.Namespace) -> ReviewedJob:
    """Return the job that the arguments describe."""
    return ReviewedJob(
        args.save,
        args.logs,
        args.nodes,
        args.rank_nodes,
        args.ranks_per_node,
        args.started,
        bool(args.exclude_bad_nodes),
        Limits(args.max_excluded_share, args.exclude_hours),
        job_id() or "",
        int(os.environ.get("SLURM_JOB_NUM_NODES") or len(args.nodes)),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
