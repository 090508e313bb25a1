"""Show the status of runs from the files they have written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.common import ToolParser, run_tool
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.report.status import RunStatus, read_status
from megatron_llmjp.report.status_table import format_status, format_statuses

EXAMPLES = """\
  Show iteration, fold, loss, throughput, remaining time, checkpoints and last error of a run:
    run_status SAVE

  List all runs of a project, one per line:
    run_status /data/runs/*/

  Print a JSON list with one object per folder, for another program:
    run_status SAVE --json

States: running; stalled (alive, but writes no log lines); starting; finished; stopped; failed
(ended early with an error); requeued (its job is pending in Slurm's queue); dead (killed, or its
machine is down)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser("run_status", "Show the status of runs (read-only).", EXAMPLES)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="SAVE", help="a run's --save folder")
    add("--json", action="store_true", help="print everything as JSON")
    args = parser.parse(argv)
    return run_tool("run_status", lambda: show_status(args.folders, args.json))


def show_status(folders: Sequence[Path], as_json: bool) -> int:
    """Print the status of the run in each folder.

    Raises:
        UserError: a folder has no run; the others are printed first.
    """
    found: list[RunStatus] = []
    wrong = []
    for folder in folders:
        try:
            found.append(read_status(folder))
        except UserError as error:
            wrong.append(str(error))
    if as_json:
        print(json.dumps([_plain(asdict(s)) for s in found], indent=1, ensure_ascii=False))
    elif len(folders) > 1 and found:
        print(format_statuses(found))
    elif found:
        print(format_status(found[0]))
    if wrong:
        raise UserError("\n".join(wrong))
    return EXIT_DONE


def _plain(value: Any) -> Any:
    """Replace infinities and NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
