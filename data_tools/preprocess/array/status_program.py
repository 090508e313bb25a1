"""``preprocess_data --status``: the progress of running, dead and finished jobs, from outside."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.common import ToolParser
from data_tools.preprocess.array.parts import (
    ArrayParts,
    PartState,
    array_folder,
    count_of_parts,
    find_keys,
    read_part,
)
from data_tools.preprocess.array.progress import (
    EXIT_CODES,
    EXIT_STALLED,
    add_up,
    format_line,
    format_parts,
    progress_json,
)
from megatron_llmjp.arguments import parse_shard
from megatron_llmjp.checkpoint.run_lock import is_owner_alive, read_owner
from megatron_llmjp.errors import UserError

STATUS_FLAG = "--status"
EXAMPLES = """\
  Show the progress of a job, or of all parts of an array and of each one:
    preprocess_data --status data/ja

  Show one part of an array, as JSON:
    preprocess_data --status data/ja --shard 3/64 --json

  Print one line for all parts every minute, until the job has ended:
    preprocess_data --status data/ja --watch 60

States and exit codes; of several parts, the first that applies:
  1  failed (ended with an error), dead (its process is gone without an end: killed, or its machine
     is down; on another machine: no heartbeat for 120 s)
  4  stalled (its process exists, but gave no sign of life for 120 s: suspended, or it hangs)
  0  running
  3  stopped (by Ctrl-C), waiting (not started), and no part is running
  0  complete
  2  no job with this prefix, or the arguments are wrong"""


def wants_status(argv: Sequence[str]) -> bool:
    """Return whether a command line is one of ``--status``."""
    return any(word.partition("=")[0] == STATUS_FLAG for word in argv)


def status_parser() -> ToolParser:
    """Return the parser of ``preprocess_data --status``."""
    parser = ToolParser(
        "preprocess_data --status", "Show the progress of jobs (read-only).", EXAMPLES
    )
    add = parser.add_argument
    add(STATUS_FLAG, nargs="*", required=True, metavar="PREFIX", help="values of --output-prefix")
    add("--shard", metavar="NUMBER/COUNT", help="only this part of an array")
    add("--json", action="store_true", help="print a JSON list with one object per prefix")
    add(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="print one line every SECONDS seconds until nothing is running",
    )
    return parser


@dataclass(frozen=True)
class Job:
    """A job, or an array of them.

    Attributes:
        prefix: its --output-prefix.
        count: number of parts; 0 for a job without parts.
        parts: states of its parts, or of the requested one.
        merged: what is known about the merged output of an array; empty without one.
    """

    prefix: str
    count: int
    parts: list[PartState]
    merged: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        head = {"prefix": self.prefix, "count": self.count or None, "merged": self.merged or None}
        return head | progress_json(add_up(self.parts), self.parts)


def show_status(args: argparse.Namespace, sleep: Callable[[float], None] = time.sleep) -> int:
    """Print the status of all prefixes; return the exit code of the worst.

    Raises:
        UserError: there is no job with a prefix.
    """
    if not args.status:  # not required by argparse, so that --status --help prints the help
        raise UserError(f"{STATUS_FLAG}: expected the --output-prefix of a job, such as data/ja")
    if args.watch is not None and (args.json or not args.watch > 0):
        raise UserError("--watch: expected a number of seconds above 0, and no --json")
    while True:
        jobs = [job for prefix in args.status for job in find_jobs(prefix, args.shard)]
        states = [add_up(job.parts).state for job in jobs]
        if args.json:
            print(json.dumps([job.to_json() for job in jobs], indent=1, ensure_ascii=False))
        for job in jobs if not args.json else ():
            line = f"{job.prefix}: {format_line(add_up(job.parts), len(job.parts))}"
            if args.watch is not None:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", flush=True)
            else:
                print("\n".join(filter(None, [line, format_parts(job.parts), job.merged])))
        is_running = any(part.state == "running" for job in jobs for part in job.parts)
        if args.watch is None or not is_running:
            codes = [EXIT_CODES[state] for state in states]
            return next((code for code in (1, EXIT_STALLED, 0, 3) if code in codes), 0)
        sleep(args.watch)


def find_jobs(prefix: str, shard: str | None) -> list[Job]:
    """Return the job with an output prefix, and its arrays.

    Raises:
        UserError: there is none, or not the requested part.
    """
    wanted, counts = None, count_of_parts(prefix)
    if shard is not None:
        number, count = parse_shard(shard)
        wanted, counts = number, [found for found in counts if found == count]
    jobs = []
    for count in counts:
        reader = ArrayParts(prefix, count)
        parts = reader.read() if wanted is None else [reader.read_one(wanted)]
        jobs.append(Job(prefix, count, parts, _merge_note(prefix)))
    whole = read_part(prefix, 0)
    if shard is None and whole.state != "waiting" and not (counts and whole.state == "complete"):
        jobs.append(Job(prefix, 0, [whole], ""))
    if not jobs:
        part = "" if shard is None else f" with --shard {shard}"
        found = ", ".join(f"{count} parts" for count in count_of_parts(prefix))
        hint = f" There are arrays of {found}." if found else ""
        raise UserError(
            f"{STATUS_FLAG} {prefix}: no job with this --output-prefix{part}: neither "
            f"{prefix}.partial nor finished output of preprocess_data exists.{hint}"
        )
    return jobs


def _merge_note(prefix: str) -> str:
    """Return what is known about the merged output of an array."""
    merged = [prefix_of for key in find_keys(prefix) if (prefix_of := f"{prefix}_{key}_document")]
    if merged:
        return f"merged: {', '.join(merged)}"
    folder = array_folder(prefix)
    owner = read_owner(folder)
    if owner is not None and is_owner_alive(folder, owner):
        return f"not merged yet: {owner} waits for the last parts and merges them"
    return f"not merged: merge_datasets --parts {prefix}"
