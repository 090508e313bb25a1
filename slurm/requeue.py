"""Whether a job that ended should be started again: exit code 0 for yes, 1 for no.

Every start is a line of ``requeues.jsonl`` in the save folder. A job that ends again and again
without a new checkpoint is in a crash loop: starting it once more would only burn nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.manifest import complete_iterations
from megatron_llmjp.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR

HISTORY = "requeues.jsonl"

PATIENCE = 2
"""Starts without a new checkpoint after which a job is not started again."""


def main() -> int:
    """Record how the job ended, and decide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--code", type=int, required=True, help="exit code of the ranks")
    args = parser.parse_args()
    path = args.save / HISTORY
    past = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    iteration = max(complete_iterations(args.save), default=0)
    again, why = decide(args.code, iteration, past)
    record = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "exit code": args.code,
        "iteration": iteration,
        "requeued": again,
        "why": why,
    }
    with path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
    print(f"exit code {args.code} at iteration {iteration}: {why}", flush=True)
    return 0 if again else 1


def decide(code: int, iteration: int, past: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether to start again, and why.

    Args:
        code: how the ranks ended; a signal that killed them gives 128 and more.
        iteration: of the newest checkpoint.
        past: records of the earlier ends, oldest first.
    """
    if code == EXIT_DONE:
        return False, "the run is over"
    if code == EXIT_USER_ERROR:
        return False, "a mistake in the arguments or the data is not mended by starting again"
    if iteration > (past[-1]["iteration"] if past else 0):
        reason = "stopped on request" if code == EXIT_REQUEUE else "failed"
        return True, f"{reason}; requeued, since there is a new checkpoint"
    fruitless = 1
    for record in reversed(past):
        if not record["requeued"] or record["iteration"] < iteration:
            break
        fruitless += 1
    if fruitless > PATIENCE:
        return False, f"no new checkpoint in {fruitless} starts: not requeued"
    return True, f"requeued, although there is no new checkpoint ({fruitless} of {PATIENCE} tries)"


if __name__ == "__main__":
    sys.exit(main())
