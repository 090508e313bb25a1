"""The report of a run: one interactive, self-contained HTML page, and its plots as PNG files."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_llmjp.config.schema import Config
from megatron_llmjp.filesystem import warn, write_atomically
from megatron_llmjp.report.charts.interactive_page import interactive_page
from megatron_llmjp.report.charts.run_names import run_name, run_names
from megatron_llmjp.report.charts.run_tables import comparison_tables, loss_table, run_tables
from megatron_llmjp.report.history import MetricsHistory, read_history
from megatron_llmjp.report.html_page import embedded_image, html_facts, image_grid
from megatron_llmjp.report.summary import summary_rows

REPORT_FOLDER = "report"
"""Name of the report's folder in the save folder."""

REPORT_FILE = "report.html"


def write_report_at_end(config: Config) -> None:
    """Write ``SAVE/report/`` and print its path; failures are printed and never raised."""
    save = config.checkpoint.save
    if save is None or not config.logging.report:
        return
    try:
        page = write_report(Path(save), Path(save) / REPORT_FOLDER)[0]
    except Exception as error:
        print(f"note: the report was not written: {type(error).__name__}: {error}", flush=True)
    else:
        print(f"report: {page}", flush=True)


def write_report(folder: Path, output: Path, title: str | None = None) -> list[Path]:
    """Read the run in ``folder`` and write ``output/report.html`` and one PNG per plot.

    Nothing else is written, so that the run may still be in progress. The title is the name of the
    run by default.

    Returns:
        The files written, the page first.

    Raises:
        UserError: the folder has no metrics file.
    """
    history = read_history(folder)
    output.mkdir(parents=True, exist_ok=True)
    images, files = [], []
    for name, image, png in _plots(history):
        images.append(image)
        plot = output / f"{name}.png"
        plot.write_bytes(png)
        files.append(plot)
    page = output / REPORT_FILE
    write_atomically(page, run_page(history, title or run_name(history), images))
    return [page, *files]


def run_page(history: MetricsHistory, name: str, images: Sequence[str] | None = None) -> str:
    """Return the page of a run.

    Args:
        history: the run.
        name: title of the page.
        images: its plots for a browser without JavaScript; drawn if None.
    """
    if images is None:
        images = [image for _, image, _ in _plots(history)]
    parts = [html_facts(summary_rows(history)), *run_tables(history)]
    subtitle = f"{_now()}, at iteration {history.iteration:,}"
    fallback = image_grid(images) or loss_table([history], [name])
    return interactive_page(name, subtitle, [history], [name], parts, fallback)


def comparison_page(
    runs: Sequence[MetricsHistory], names: Sequence[str] | None = None, title: str | None = None
) -> str:
    """Return one page with the curves of several runs.

    Args:
        runs: the runs.
        names: their names; None for those of the save folders.
        title: title of the page; None for the names.
    """
    names = names or run_names(runs)
    parts = comparison_tables(runs, names)
    fallback = loss_table(runs, names)
    subtitle = f"{_now()}, {len(runs)} runs"
    return interactive_page(title or " / ".join(names), subtitle, runs, names, parts, fallback)


def _plots(history: MetricsHistory) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, ``img`` element and PNG of each plot; nothing without matplotlib."""
    try:
        # Imported late: it takes a second.
        from megatron_llmjp.report.plots import draw_all, png_image
    except ImportError:  # the interactive page does not need it
        warn("matplotlib is not installed: the report has no figures as PNG")
        return
    with warnings.catch_warnings():
        # Without a Japanese font PNG files show boxes; the page uses the fonts of the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for name, title, figure in draw_all(history):
            png = png_image(figure)
            figure.set_layout_engine("none")  # computed; it takes as long as drawing
            yield name, embedded_image(figure, title), png


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")
