"""Plot training runs: an interactive HTML report of one run or several, and figures as PNG."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.report.charts.run_names import run_name, run_names
from megatron_llmjp.report.charts.run_tables import comparison_rows
from megatron_llmjp.report.history import MetricsHistory, read_history
from megatron_llmjp.report.page import comparison_page, run_page, write_report
from megatron_llmjp.report.summary import summary_rows

COMPARISON_FILE = "comparison.html"
"""Default page of several runs, in the current folder."""

EXAMPLES = f"""\
  Write the report of a finished or running run to SAVE/report:
    report_run SAVE

  Write it to another folder, for a run whose folder is not writable:
    report_run /shared/run7 --output-dir ~/run7

  Compare runs in one page ({COMPARISON_FILE} without -o):
    report_run run7 run8 run9 --labels baseline "lr 3e-4" "lr 6e-4" -o page.html

  Print only the summary table:
    report_run SAVE --summary

The page is one file that works offline: hover for values, drag to zoom, choose smoothing, a
logarithmic scale, and tokens or iterations as the x axis."""


@dataclass(frozen=True)
class ReportRequest:
    """What to report, and where to."""

    folders: Sequence[Path]
    labels: Sequence[str] | None = None
    title: str | None = None
    output: Path | None = None
    """The page; None for the default."""
    output_folder: Path | None = None
    """Folder of the page and figures of one run."""
    summary: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser(
        "report_run",
        "Plot a run's loss, folds, events, learning rate, throughput and more from its logs, or "
        "compare several runs (read-only).",
        EXAMPLES,
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="SAVE", help="a run's --save folder")
    add("-o", "--output", type=Path, metavar="FILE", help="page to write, without PNG figures")
    add(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="one run: folder of the page and the figures (default: SAVE/report)",
    )
    add("--labels", nargs="+", metavar="NAME", help="names of the runs (default: their folders')")
    add("--title", metavar="TEXT", help="title of the page (default: the names of the runs)")
    add("--summary", action="store_true", help="print the summary table without writing files")
    args = parser.parse(argv)
    request = ReportRequest(
        args.folders, args.labels, args.title, args.output, args.output_dir, args.summary
    )
    return run_tool("report_run", lambda: report_runs(request))


def report_runs(request: ReportRequest) -> int:
    """Print the summary, and write the page and figures unless only the summary is requested.

    Raises:
        UserError: the request is inconsistent, or a folder has no run.
    """
    _check(request)
    runs = [read_history(folder) for folder in request.folders]
    names = list(request.labels or run_names(runs))
    for cells in _summary(runs, names):
        print(cells.rstrip())
    if request.summary:
        return EXIT_DONE
    if len(runs) > 1:
        page = request.output or Path(COMPARISON_FILE)
        write_atomically(page, comparison_page(runs, names, request.title))
        print(f"\nwrote {page}")
    elif request.output is not None:
        write_atomically(request.output, run_page(runs[0], request.title or names[0]))
        print(f"\nwrote {request.output}")
    else:
        folder = request.output_folder or request.folders[0] / "report"
        title = request.title or (names[0] if request.labels else run_name(runs[0]))
        page, *pictures = write_report(request.folders[0], folder, title)
        print(f"\nwrote {page} and {len(pictures)} figures next to it")
    return EXIT_DONE


def _check(request: ReportRequest) -> None:
    number = len(request.folders)
    problems = []
    if request.labels is not None and len(request.labels) != number:
        problems.append(
            f"--labels has {len(request.labels)} names, but there are {number} runs: give one "
            "name per SAVE, and put --labels after the folders"
        )
    if request.labels is not None and len(set(request.labels)) < len(request.labels):
        problems.append(f"--labels {' '.join(request.labels)}: the names must differ")
    if request.output is not None and request.output_folder is not None:
        problems.append("-o FILE and --output-dir DIR exclude each other: remove one of them")
    if number > 1 and request.output_folder is not None:
        problems.append("--output-dir is for one run: several are one page, -o FILE")
    if request.output is not None and request.output.is_dir():
        problems.append(f"-o {request.output} is a folder: expected a file such as page.html")
    elif request.output is not None and not request.output.parent.is_dir():
        problems.append(f"-o {request.output}: the folder {request.output.parent} does not exist")
    if problems:
        raise UserError("\n".join(problems))


def _summary(runs: Sequence[MetricsHistory], names: Sequence[str]) -> list[str]:
    """Return the summary as lines: labels and values, with several runs one below the other."""
    if len(runs) == 1:
        rows = summary_rows(runs[0])
        width = max(len(label) for label, _ in rows)
        return [f"{label:<{width}}  {value}" for label, value in rows]
    lines: list[str] = []
    rows_of_runs = comparison_rows(runs)
    width = max(map(len, names))
    for label, values in rows_of_runs:
        lines.append(label)
        lines += [f"  {name:<{width}}  {text}" for name, text in zip(names, values, strict=True)]
    return lines


if __name__ == "__main__":
    sys.exit(main())
