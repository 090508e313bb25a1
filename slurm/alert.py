"""Send the alerts of a job's end: of the nodes that it excluded, and of how its ranks ended.

Called by the job scripts after ``requeue.py`` has recorded the end, with the arguments of the run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_llmjp.alerts.delivery import Alert, deliver
from megatron_llmjp.alerts.destinations import destinations_of_arguments
from megatron_llmjp.alerts.run_end import end_event
from megatron_llmjp.checkpoint.run_lock import IN_USE
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE, UserError
from megatron_llmjp.report.exclusions import read_exclusions
from megatron_llmjp.report.jobs import excluded_nodes, read_job_ends
from megatron_llmjp.report.status import read_status


def main(argv: Sequence[str] | None = None) -> int:
    """Send the alerts; the exit code is 1 if one was dropped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, required=True, help="save folder of the run")
    parser.add_argument("--code", type=int, required=True, help="exit code of the ranks")
    parser.add_argument("--preflight", action="store_true", help="the preflight check failed")
    parser.add_argument("--started", type=float, default=0.0, help="start of the job or its ranks")
    parser.add_argument("arguments", nargs="*", help="arguments of the run, after --")
    args = parser.parse_args(argv)
    destinations = destinations_of_arguments(args.arguments)
    if not destinations:
        return EXIT_DONE
    record = _recorded_end(args.save, os.environ)
    excluded = {}
    if args.preflight and record is None:
        excluded = _exclusions_since(args.started, args.save, os.environ)
    if excluded:  # the job goes on without these nodes: it has not ended
        alerts = [Alert("exclusion", f"excluded {_describe(excluded)}", str(args.save))]
    else:
        alerts = end_alerts(args.save, args.code, record)
    delivered = [deliver(alert, destinations) for alert in alerts]
    return EXIT_DONE if all(delivered) else EXIT_FAILURE


def _recorded_end(save: Path, env: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return the record of the end of this start of the job."""
    ends, restart = read_job_ends(save), env.get("SLURM_RESTART_COUNT")
    if (
        ends
        and ends[-1].get("job") == _job_id(env)
        and ends[-1].get("restart") == int(restart or 0)
    ):
        return ends[-1]
    return None


def _job_id(env: Mapping[str, str]) -> str | None:
    return env.get("SLURM_JOB_ID") or env.get("PBS_JOBID")


def _exclusions_since(started: float, save: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return the nodes that the job has excluded since this time, with reasons."""
    found = [one for one in read_exclusions(save) if one.job == _job_id(env)]
    return {one.node: one.reason for one in found if one.time >= started}


def _describe(nodes: Mapping[str, str]) -> str:
    return "; ".join(f"{node}: {reason or 'unknown'}" for node, reason in nodes.items())


def end_alerts(save: Path, code: int, record: Mapping[str, Any] | None) -> list[Alert]:
    """Return the alerts of a job's end; none for a job that was rejected by a run in progress.

    Args:
        save: the save folder.
        code: exit code of the ranks.
        record: record of the end; None if it could not be written.
    """
    state, why = "", ""
    try:
        status = read_status(save)
    except (UserError, OSError):
        pass
    else:
        state, why = status.state, status.why
    alerts = []
    if record is not None:
        nodes = excluded_nodes([record])
        if nodes:
            alerts.append(Alert("exclusion", f"excluded {_describe(nodes)}", str(save)))
        cause = record.get("cause")
        if IN_USE in str(cause):
            return []
        if code != EXIT_DONE or not why:  # which code says nothing about the reason
            why = str(record.get("why")) + (f"; first error: {cause}" if cause else "")
    message = f"exit code {code}: {why}" if why else f"exit code {code}"
    return [*alerts, Alert(end_event(code, state, message), message, str(save))]


if __name__ == "__main__":
    main()
