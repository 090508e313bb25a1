"""Draw what a training run did: one HTML page, and its pictures as PNG files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from megatron_llmjp.errors import EXIT_DONE
from megatron_llmjp.report.history import read_history
from megatron_llmjp.report.page import write_report
from megatron_llmjp.report.summary import summarize

EXAMPLES = """\
  The page and pictures of a run, finished or still going on, in SAVE/report:
    report_run SAVE

  Into another folder, when the run is somebody else's:
    report_run /shared/run7 --output-dir ~/run7

  Only the table, on the screen:
    report_run SAVE --summary"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser(
        "report_run",
        "Draw a run's loss, folds, restarts, learning rate, throughput and more from what it has "
        "written so far. The run is only read.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="SAVE", help="the run's --save folder")
    add("--output-dir", type=Path, metavar="DIR", help="where to write; SAVE/report if not given")
    add("--summary", action="store_true", help="print the table and write nothing")
    args = parser.parse(argv)
    return run_tool("report_run", lambda: report_run(args.folder, args.output_dir, args.summary))


def report_run(folder: Path, output: Path | None, summary: bool) -> int:
    """Print the summary; write the page and pictures unless only that is asked for."""
    rows = summarize(read_history(folder))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    if not summary:
        page, *pictures = write_report(folder, output or folder / "report")
        print(f"\nwrote {page} and {len(pictures)} pictures beside it")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
