"""Decision whether to requeue a finished job: exit code 0 to requeue, 1 otherwise.

Each end of a job appends a line to ``requeues.jsonl`` in the save folder. A job that repeatedly
ends without a new checkpoint is in a crash loop and is not requeued.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.manifest import complete_iterations
from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_llmjp.report.first_cause import SHOWN_LOGS, Cause, find_cause
from megatron_llmjp.report.jobs import REQUEUE_LOG, read_job_ends

HISTORY = REQUEUE_LOG

MAX_FRUITLESS_STARTS = 2
"""Consecutive starts without a new checkpoint that are tolerated."""


def main(argv: Sequence[str] | None = None) -> int:
    """Decide, and record the end of the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--code", type=int, required=True, help="exit code of the ranks")
    parser.add_argument("--logs", type=Path, help="folder of the logs of this start")
    parser.add_argument("--seconds", type=int, help="how long the job ran")
    args = parser.parse_args(argv)
    cause = _print_cause(args.logs) if args.code not in (EXIT_DONE, EXIT_REQUEUE) else None
    path = args.save / HISTORY
    history = [record for record in read_job_ends(args.save) if _is_valid(record)]
    iteration = max(complete_iterations(args.save), default=0)
    requeue, reason = decide(args.code, iteration, history)
    record = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "seconds": args.seconds,
        "exit code": args.code,
        "iteration": iteration,
        "requeued": requeue,
        "why": reason,
    }
    if cause is not None:
        record["cause"] = cause.summary
    try:
        with path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    except OSError as error:
        print(f"warning: {path}: {error.strerror}: this end of the job is not recorded", flush=True)
        # Without a record a crash loop cannot be recognized.
        requeue, reason = False, f"not requeued: {path} cannot be written"
    print(f"exit code {args.code} at iteration {iteration}: {reason}", flush=True)
    return 0 if requeue else 1


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
        return False, "the run is finished"
    if code == EXIT_USER_ERROR:
        return False, "an error in the arguments or the data is not fixed by a requeue"
    if iteration > (history[-1]["iteration"] if history else 0):
        reason = "stopped on request" if code == EXIT_REQUEUE else "failed"
        return True, f"{reason}; requeued: there is a new checkpoint"
    fruitless = 1
    for record in reversed(history):
        if not record["requeued"] or record["iteration"] < iteration:
            break
        fruitless += 1
    if fruitless > MAX_FRUITLESS_STARTS:
        return False, f"not requeued: no new checkpoint in {fruitless} starts"
    tries = f"{fruitless} of at most {MAX_FRUITLESS_STARTS} tries"
    return True, f"requeued without a new checkpoint ({tries})"


if __name__ == "__main__":
    sys.exit(main())
