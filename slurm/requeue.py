"""Decision how a job continues after its ranks or its preflight ended, and on which nodes.

Exit code 0: requeue the job, without the nodes in ``exclude``; 4: restart in this job, on the nodes
in ``healthy_nodes``; 1: end the job. Both files are in the folder of the logs. Each end of a job
appends a line to ``requeues.jsonl`` in the save folder, each excluded node one to
``exclusions.jsonl``. A job that repeatedly ends without a new checkpoint is in a crash loop and is
neither requeued nor restarted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.manifest import complete_iterations
from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_llmjp.report.first_cause import SHOWN_LOGS, Cause, find_cause
from megatron_llmjp.report.jobs import REQUEUE_LOG, read_job_ends
from slurm.exclusions import describe
from slurm.node_review import NodeReview, ReviewedJob, add_arguments, reviewed_job
from slurm.sick_nodes import SickNode
from slurm.this_job import job_id, restart_count

HISTORY = REQUEUE_LOG

MAX_FRUITLESS_STARTS = 2
"""Consecutive starts without a new checkpoint that are tolerated."""

REQUEUE, END, RESTART = 0, 1, 4
"""Exit codes."""


@dataclass(frozen=True)
class Next:
    """How a job continues."""

    code: int
    """:data:`REQUEUE`, :data:`END` or :data:`RESTART`."""
    why: str


def main(argv: Sequence[str] | None = None) -> int:
    """Decide, and record the end of the job."""
    args = _parse(argv)
    cause = _print_cause(args.logs) if args.code not in (EXIT_DONE, EXIT_REQUEUE) else None
    history = [record for record in read_job_ends(args.save) if _is_valid(record)]
    iteration = max(complete_iterations(args.save), default=0)
    job, review = reviewed_job(args), None
    requeue, reason = decide(args.code, iteration, history)
    following = Next(REQUEUE if requeue else END, reason)
    if args.end:
        following = Next(END, f"not requeued: {args.end}")
    elif job.nodes and args.logs is not None:
        review = job.review(args.code, args.preflight)
        following = decide_next(args.preflight, review, following)
        has_trained = any(end.get("job") == job.id and end["iteration"] > 0 for end in history)
        if args.preflight and job.excludes and following.code == END and requeue and has_trained:
            following, review = _retry_preflight(following, review, reason)
    try:
        excluded = _leave_nodes(job, review, following, iteration) if review is not None else ()
        if not (args.preflight and following.code == RESTART):  # the job has not ended
            _record_end(args, iteration, following, cause, excluded)
    except OSError as error:
        # Without records a crash loop cannot be recognized.
        file = error.filename or args.save
        print(f"warning: {file}: {error.strerror}: this end of the job is not recorded", flush=True)
        following = Next(END, f"not requeued: {file} cannot be written")
    print(f"exit code {args.code} at iteration {iteration}: {following.why}", flush=True)
    return following.code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--code", type=int, required=True, help="exit code of the ranks")
    parser.add_argument("--logs", type=Path, help="folder of the logs of this start")
    parser.add_argument("--seconds", type=int, help="how long the job ran")
    parser.add_argument("--preflight", action="store_true", help="the preflight check failed")
    parser.add_argument("--end", metavar="WHY", help="end the job, for this reason")
    add_arguments(parser)
    return parser.parse_args(argv)


def decide_next(preflight: bool, review: NodeReview, by_history: Next) -> Next:
    """Return how a job continues, from its nodes and its earlier ends.

    Args:
        preflight: whether the preflight check failed, before any rank started.
        review: the review of the job's nodes.
        by_history: the decision by the earlier ends alone.
    """
    decision = review.decision
    continues = decision.action != "requeue"
    if preflight:
        if review.common or decision.refusal or not decision.excluded:
            why = review.common or decision.refusal or "see its messages above"
            return Next(END, f"not requeued: the preflight check failed: {why}")
        if continues:
            return Next(RESTART, "the preflight check failed on nodes that are excluded")
    if by_history.code == REQUEUE and continues:
        return Next(RESTART, by_history.why.replace("requeued", "restarted in this job"))
    return by_history


def _retry_preflight(following: Next, review: NodeReview, reason: str) -> tuple[Next, NodeReview]:
    """Requeue a job that has trained before: its settings are right, and the fault may pass."""
    why = following.why.removeprefix("not requeued: ")
    decision = replace(review.decision, action="requeue")
    return Next(REQUEUE, f"{why}; {reason}"), replace(review, decision=decision)


def _leave_nodes(
    job: ReviewedJob, review: NodeReview, following: Next, iteration: int
) -> Sequence[SickNode]:
    """Print and record the nodes that the job excludes, and prepare its next start.

    Raises:
        OSError: a file cannot be written.
    """
    if following.code == END:
        lines = [f"{node.node} seems sick: {node.reason}" for node in review.sick]
    else:
        lines = describe(review.decision)
    for line in lines:
        print(line, flush=True)
    if following.code == END:
        return ()
    excluded = job.record(review, iteration)
    prepare = job.prepare_restart if following.code == RESTART else job.prepare_requeue
    prepare(review)
    return excluded


def _record_end(
    args: argparse.Namespace,
    iteration: int,
    following: Next,
    cause: Cause | None,
    excluded: Sequence[SickNode],
) -> None:
    """Append the end of this start to the history.

    Raises:
        OSError: the history cannot be written.
    """
    record: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": job_id(),
        "restart": restart_count(),
        "seconds": args.seconds,
        "exit code": args.code,
        "iteration": iteration,
        "requeued": following.code != END,
        "why": following.why,
    }
    if following.code == RESTART:
        record["in this job"] = True
    if cause is not None:
        record["cause"] = cause.summary
    if excluded:
        record["excluded"] = [{"node": one.node, "reason": one.reason} for one in excluded]
    with (args.save / HISTORY).open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def _print_cause(logs: Path | None) -> Cause | None:
    """Print the first error of any rank, unless the job's log already contains it."""
    cause = find_cause(logs) if logs is not None else None
    if cause is not None and cause.log not in SHOWN_LOGS:
        text = "\n".join(cause.lines)
        print(f"the first cause, in {logs}/{cause.log}:\n{text}", flush=True)
    return cause


def _is_valid(record: dict[str, Any]) -> bool:
    """Return whether a record of an earlier end has the entries that :func:`decide` reads."""
    is_number = type(record.get("iteration")) is int
    return is_number and isinstance(record.get("requeued"), bool)


def decide(code: int, iteration: int, history: list[dict[str, Any]]) -> tuple[bool, str]:
    """Return whether to requeue the job, and the reason.

    Args:
        code: exit code of the ranks; 128 + N if signal N killed them.
        iteration: iteration of the newest checkpoint.
        history: records of earlier ends, oldest first.
    """
    if code == EXIT_DONE:
        return False, "not requeued: the run is finished, or was stopped by its stop file"
    if code == EXIT_USER_ERROR:
        return False, "an error in the arguments or the data is not fixed by a requeue"
    if iteration > (history[-1]["iteration"] if history else 0):
        reason = "stopped on request" if code == EXIT_REQUEUE else "failed"
        return True, f"{reason}; requeued: there is a new checkpoint"
    fruitless = 1
    before = [0, *(record["iteration"] for record in history)]
    for record, earlier in zip(reversed(history), reversed(before[:-1]), strict=True):
        if not record["requeued"] or record["iteration"] > earlier:
            break
        fruitless += 1
    if fruitless > MAX_FRUITLESS_STARTS:
        return False, f"not requeued: no new checkpoint in {fruitless} starts"
    tries = f"{fruitless} of at most {MAX_FRUITLESS_STARTS} tries"
    return True, f"requeued without a new checkpoint ({tries})"


if __name__ == "__main__":
    sys.exit(main())
