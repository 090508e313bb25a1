"""Show the status of runs from the files they have written, and report it as an exit code."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from megatron_llmjp.errors import EXIT_USER_ERROR, UserError
from megatron_llmjp.report.run_state import worst_exit_code
from megatron_llmjp.report.status import RunStatus, read_statuses, status_json
from megatron_llmjp.report.status_table import format_status, format_statuses

EXAMPLES = """\
  Show iteration, fold, loss, throughput, remaining time, checkpoints and last error of a run:
    run_status SAVE

  List all runs of a project, one per line, and again every minute until Ctrl-C:
    run_status /data/runs/*/ --watch 60

  Print a JSON list with one object per folder, for another program; with several folders, what
  takes long to read is null (size of checkpoints, number of folds, errors of healthy runs):
    run_status SAVE --json

  Report a problem from a cron job:
    run_status SAVE > status.txt || mail -s "run_status: $?" me@example.org < status.txt

States and exit codes; of several runs, the first of 2, 1, 4, 3, 0 that applies:
  0  running; starting; finished; requeued (its job waits in Slurm's queue)
  1  failed (ended early with an error); dead (killed, or its machine is down)
  2  a folder has no run, or the arguments are wrong
  3  stopped (early); held (its job waits in Slurm's queue until somebody releases it);
     suspended (by Slurm)
  4  stalled (alive, but writes no log lines)"""

CLEAR_TERMINAL = "\x1b[H\x1b[2J\x1b[3J"
"""Control sequence that moves to the top left and erases screen and scrollback."""


def main(argv: Sequence[str] | None = None, sleep: Callable[[float], None] = time.sleep) -> int:
    """Run the program and return its exit code; ``sleep`` waits between two refreshes."""
    parser = ToolParser("run_status", "Show the status of runs (read-only).", EXAMPLES)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="SAVE", help="a run's --save folder")
    add("--json", action="store_true", help="print everything as JSON")
    add(
        "--watch",
        type=_positive,
        metavar="SECONDS",
        help="refresh every SECONDS seconds until Ctrl-C; the exit code is that of the last status",
    )
    args = parser.parse(argv)
    if args.watch is None:
        return run_tool("run_status", lambda: show_status(args.folders, args.json))
    return run_tool("run_status", lambda: watch(args.folders, args.json, args.watch, sleep))


def watch(
    folders: Sequence[Path], as_json: bool, seconds: float, sleep: Callable[[float], None]
) -> int:
    """Show the status again and again until Ctrl-C; return the exit code of the last one.

    A folder without a run is reported and may get one later.
    """
    code = EXIT_USER_ERROR
    try:
        while True:
            if sys.stdout.isatty():
                print(CLEAR_TERMINAL, end="")
            if not as_json:
                print(time.strftime("%Y-%m-%d %H:%M:%S"))
            try:
                code = show_status(folders, as_json)
            except UserError as error:
                print(f"run_status: {error}", file=sys.stderr)
                code = EXIT_USER_ERROR
            sys.stdout.flush()
            sleep(seconds)
    except KeyboardInterrupt:
        return code


def show_status(folders: Sequence[Path], as_json: bool) -> int:
    """Print the status of the run in each folder and return the exit code of the worst one.

    Raises:
        UserError: a folder has no run; the others are printed first.
    """
    results = read_statuses(folders, details=len(folders) == 1)
    found = [status for status in results if isinstance(status, RunStatus)]
    wrong = [str(error) for error in results if isinstance(error, UserError)]
    if as_json:
        print(json.dumps([status_json(s) for s in found], indent=1, ensure_ascii=False))
    elif len(folders) > 1 and found:
        print(format_statuses(found))
    elif found:
        print(format_status(found[0]))
    if wrong:
        raise UserError("\n".join(wrong))
    return worst_exit_code(status.state for status in found)


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds above 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
