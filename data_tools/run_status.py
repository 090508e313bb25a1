"""Show the status of runs from the files they have written, and report it as an exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from megatron_llmjp.errors import EXIT_USER_ERROR, UserError
from megatron_llmjp.formatting import shorten, text_width
from megatron_llmjp.report.live.loss_samples import sample_losses
from megatron_llmjp.report.live.screen import Screen, is_interactive
from megatron_llmjp.report.live.sparkline import ASCII, BLOCKS, limits, sparkline
from megatron_llmjp.report.run_state import worst_exit_code
from megatron_llmjp.report.status import RunStatus, read_statuses, status_json
from megatron_llmjp.report.status_table import format_status, format_statuses

EXAMPLES = """\
  Show iteration, fold, loss, throughput, remaining time, checkpoints and last error of a run:
    run_status SAVE

  Watch a run with the curve of its loss until Ctrl-C (SECONDS after --watch, folders before it):
    run_status SAVE --watch

  List all runs of a project, one per line, and again every minute:
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

DEFAULT_SECONDS = 5.0
"""Time between two refreshes with ``--watch`` alone."""
SPARK_ROWS = 4
"""Height of the curve of the loss of one run."""


def main(argv: Sequence[str] | None = None, sleep: Callable[[float], None] = time.sleep) -> int:
    """Run the program and return its exit code; ``sleep`` waits between two refreshes."""
    parser = ToolParser("run_status", "Show the status of runs (read-only).", EXAMPLES)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="SAVE", help="a run's --save folder")
    add("--json", action="store_true", help="print everything as JSON")
    add(
        "--watch",
        nargs="?",
        type=_positive,
        const=DEFAULT_SECONDS,
        metavar="SECONDS",
        help=f"refresh every SECONDS seconds ({DEFAULT_SECONDS:g} if not given) until Ctrl-C, in a "
        "terminal in place and with the curve of the loss; the exit code is that of the last one",
    )
    args = parser.parse(argv)
    if args.watch is None:
        return run_tool("run_status", lambda: show_status(args.folders, args.json))
    if is_interactive(sys.stdout) and not args.json:
        return run_tool("run_status", lambda: watch_in_place(args.folders, args.watch, sleep))
    return run_tool("run_status", lambda: watch(args.folders, args.json, args.watch, sleep))


def watch_in_place(folders: Sequence[Path], seconds: float, sleep: Callable[[float], None]) -> int:
    """Redraw the status and the curve of the loss in a terminal until Ctrl-C.

    The terminal is restored, also after SIGTERM, and shows the last status.

    Returns:
        The exit code of the last status.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    code = EXIT_USER_ERROR
    with contextlib.suppress(KeyboardInterrupt), Screen() as screen:
        while True:
            text, problems, code = _status(folders, as_json=False)
            curves = _curves(folders, screen.columns)
            lines = [time.strftime("%Y-%m-%d %H:%M:%S"), *text.splitlines(), *problems, *curves]
            screen.draw(lines, f"every {seconds:g} s, Ctrl-C to end")
            screen.wait(seconds, sleep)
    return code


def watch(
    folders: Sequence[Path], as_json: bool, seconds: float, sleep: Callable[[float], None]
) -> int:
    """Print the status again and again until Ctrl-C; return the exit code of the last one.

    A folder without a run is reported and may get one later.
    """
    code = EXIT_USER_ERROR
    try:
        while True:
            if not as_json:
                print(time.strftime("%Y-%m-%d %H:%M:%S"))
            text, problems, code = _status(folders, as_json)  # known before it is seen
            if text:
                print(text, flush=True)
            for problem in problems:
                print(f"run_status: {problem}", file=sys.stderr)
            sys.stdout.flush()
            sleep(seconds)
    except KeyboardInterrupt:
        return code


def show_status(folders: Sequence[Path], as_json: bool) -> int:
    """Print the status of the run in each folder and return the exit code of the worst one.

    Raises:
        UserError: a folder has no run; the others are printed first.
    """
    text, problems, code = _status(folders, as_json)
    if text:
        print(text)
    if problems:
        raise UserError("\n".join(problems))
    return code


def _status(folders: Sequence[Path], as_json: bool) -> tuple[str, list[str], int]:
    """Return the status as text, the problems of folders without a run, and the exit code."""
    results = read_statuses(folders, details=len(folders) == 1)
    found = [status for status in results if isinstance(status, RunStatus)]
    problems = [str(error) for error in results if isinstance(error, UserError)]
    text = ""
    if as_json:
        text = json.dumps([status_json(s) for s in found], indent=1, ensure_ascii=False)
    elif found:
        text = format_statuses(found) if len(folders) > 1 else format_status(found[0])
    code = EXIT_USER_ERROR if problems else worst_exit_code(status.state for status in found)
    return text, problems, code


def _curves(folders: Sequence[Path], columns: int) -> list[str]:
    """Return the curves of the training losses: of one run in several rows, else one row each."""
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    blocks = BLOCKS if is_unicode else ASCII
    names = [folder.resolve().name for folder in folders]
    width = min(24, max(map(text_width, names)))
    lines = []
    for folder, name in zip(folders, names, strict=True):
        points = sample_losses(folder)
        if len(points) < 2:
            continue
        losses = [loss for _, loss in points]
        low, high = limits(losses)
        if len(folders) > 1:
            label = shorten(name, width)
            label += " " * (width - text_width(label))
            room = max(10, columns - width - 12)
            lines.append(f"{label}  {sparkline(losses, room, 1, blocks)[0]} {losses[-1]:.4f}")
            continue
        rows = sparkline(losses, max(10, columns - 12), SPARK_ROWS, blocks)
        sides = [f"{high:9.4f}", *[" " * 9] * (SPARK_ROWS - 2), f"{low:9.4f}"]
        lines += [f"{side} {row}" for side, row in zip(sides, rows, strict=True)]
        lines.append(f"{'':9} loss, iterations {points[0][0]:,} to {points[-1][0]:,}")
    return ["", *lines] if lines else []


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
