"""Send the alerts of a job's end: of the nodes that it excluded, and of how its ranks ended.

Called by the job scripts after ``requeue.py`` has recorded the end, with the arguments of the run,
and at the start of a requeued job whose script may have been ended before it recorded anything.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_llmjp.alerts.delivery import Alert, deliver
from megatron_llmjp.alerts.destinations import destinations_of_arguments
from megatron_llmjp.alerts.run_end import end_event, read_state
from megatron_llmjp.checkpoint.run_lock import IN_USE
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE
from megatron_llmjp.report.exclusions import read_exclusions
from megatron_llmjp.report.jobs import excluded_nodes, format_excluded, read_job_ends
from megatron_llmjp.report.metrics_tail import read_recent_metrics
from slurm.this_job import job_id, restart_count


def main(argv: Sequence[str] | None = None) -> int:
    """Send the alerts; the exit code is 1 if one was dropped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, required=True, help="save folder of the run")
    ended = parser.add_mutually_exclusive_group(required=True)
    ended.add_argument("--code", type=int, help="exit code of the ranks")
    ended.add_argument(
        "--previous-start", action="store_true", help="report the previous start, if nobody did"
    )
    parser.add_argument("--preflight", action="store_true", help="the preflight check failed")
    parser.add_argument("--started", type=float, default=0.0, help="start of the job or its ranks")
    parser.add_argument("arguments", nargs="*", help="arguments of the run, after --")
    args = parser.parse_args(argv)
    destinations = destinations_of_arguments(args.arguments)
    if not destinations:
        return EXIT_DONE
    alerts = (
        alerts_of_previous_start(args.save, os.environ)
        if args.previous_start
        else alerts_of_job(args, os.environ)
    )
    delivered = [deliver(alert, destinations) for alert in alerts]
    return EXIT_DONE if all(delivered) else EXIT_FAILURE


def alerts_of_job(args: argparse.Namespace, env: Mapping[str, str]) -> list[Alert]:
    """Return the alerts of a job that has ended, or continues without some of its nodes."""
    record = _recorded_end(args.save, env)
    excluded = {}
    if args.preflight and record is None:
        excluded = _exclusions_since(args.started, args.save, env)
    if excluded:  # the job continues without these nodes: it has not ended
        return [Alert("exclusion", f"excluded {format_excluded(excluded)}", str(args.save))]
    return end_alerts(args.save, args.code, record)


def alerts_of_previous_start(save: Path, env: Mapping[str, str]) -> list[Alert]:
    """Return the alert of a start that ended together with its script; none if it was recorded."""
    job, restart = job_id(env), restart_count(env)
    records = [end for end in read_job_ends(save) if not end.get("in this job")]
    if any((end.get("job"), end.get("restart")) == (job, restart - 1) for end in records):
        return []
    end = read_recent_metrics(save).end
    if end is not None and end.get("outcome") == "stopped":
        return [Alert("stop", f"Slurm requeued job {job}: {end.get('why')}", str(save))]
    why = "its first node was lost, or it was preempted or requeued by hand"
    return [Alert("crash", f"Slurm requeued job {job}: {why}", str(save))]


def _recorded_end(save: Path, env: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return the record of the end of this start of the job."""
    start = {"job": job_id(env), "restart": restart_count(env)}
    ends = read_job_ends(save)
    return ends[-1] if ends and start.items() <= ends[-1].items() else None


def _exclusions_since(started: float, save: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return the nodes that the job has excluded since this time, with reasons."""
    found = [one for one in read_exclusions(save) if one.job == job_id(env)]
    return {one.node: one.reason for one in found if one.time >= started}


def end_alerts(save: Path, code: int, record: Mapping[str, Any] | None) -> list[Alert]:
    """Return the alerts of a job's end; none for a job that was rejected by a run in progress.

    Args:
        save: the save folder.
        code: exit code of the ranks.
        record: record of the end; None if it could not be written.
    """
    state, why = read_state(save)
    alerts = []
    if record is not None:
        nodes = excluded_nodes([record])
        if nodes:
            alerts.append(Alert("exclusion", f"excluded {format_excluded(nodes)}", str(save)))
        cause = record.get("cause")
        if IN_USE in str(cause):
            return []
        if code != EXIT_DONE or not why:  # which code says nothing about the reason
            why = str(record.get("why")) + (f"; first error: {cause}" if cause else "")
    message = f"exit code {code}: {why}" if why else f"exit code {code}"
    return [*alerts, Alert(end_event(code, state, message), message, str(save))]


if __name__ == "__main__":
    main()
