"""Plot a training run: one HTML report, and its figures as PNG files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from megatron_llmjp.errors import EXIT_DONE
from megatron_llmjp.report.history import read_history
from megatron_llmjp.report.page import write_report
from megatron_llmjp.report.summary import summary_rows

EXAMPLES = """\
  Write the report of a finished or running run to SAVE/report:
    report_run SAVE

  Write it to another folder, for a run whose folder is not writable:
    report_run /shared/run7 --output-dir ~/run7

  Print only the summary table:
    report_run SAVE --summary"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser(
        "report_run",
        "Plot a run's loss, folds, restarts, learning rate, throughput and more from its logs "
        "(read-only).",
        EXAMPLES,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="SAVE", help="the run's --save folder")
    add("--output-dir", type=Path, metavar="DIR", help="output folder (default: SAVE/report)")
    add("--summary", action="store_true", help="print the summary table without writing files")
    args = parser.parse(argv)
    return run_tool("report_run", lambda: report_run(args.folder, args.output_dir, args.summary))


def report_run(folder: Path, output: Path | None, summary: bool) -> int:
    """Print the summary, and write the page and figures unless only the summary is requested."""
    rows = summary_rows(read_history(folder))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    if not summary:
        page, *pictures = write_report(folder, output or folder / "report")
        print(f"\nwrote {page} and {len(pictures)} figures next to it")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
