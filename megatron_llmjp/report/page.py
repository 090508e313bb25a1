"""The report of a run: one self-contained HTML page, and its plots as PNG files."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.report.history import MetricsHistory, read_history
from megatron_llmjp.report.html_page import embedded_image, html_facts, html_page
from megatron_llmjp.report.summary import summary_rows

REPORT_FOLDER = "report"
"""Name of the report's folder in the save folder."""

REPORT_FILE = "report.html"


def write_report_at_end(save: str | None) -> None:
    """Write ``SAVE/report/`` and print its path; failures are printed and never raised."""
    if save is None:
        return
    try:
        page = write_report(Path(save), Path(save) / REPORT_FOLDER)[0]
    except Exception as error:
        print(f"note: the report was not written: {type(error).__name__}: {error}", flush=True)
    else:
        print(f"report: {page}", flush=True)


def write_report(folder: Path, output: Path) -> list[Path]:
    """Read the run in ``folder`` and write ``output/report.html`` and one PNG per plot.

    Nothing else is written, so that the run may still be in progress.

    Returns:
        The files written, the page first.

    Raises:
        UserError: the folder has no metrics file.
    """
    from megatron_llmjp.report.plots import draw_all  # imported late: matplotlib takes a second

    history = read_history(folder)
    output.mkdir(parents=True, exist_ok=True)
    images, files = [], []
    with warnings.catch_warnings():
        # Without a Japanese font PNG files show boxes; the page uses the fonts of the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for name, title, figure in draw_all(history):
            images.append(embedded_image(figure, title))
            plot = output / f"{name}.png"
            figure.savefig(plot, dpi=130)
            files.append(plot)
    page = output / REPORT_FILE
    write_atomically(page, _page(history, images))
    return [page, *files]


def _page(history: MetricsHistory, images: list[str]) -> str:
    now = time.strftime("%Y-%m-%d %H:%M")
    return html_page(
        history.folder.resolve().name,
        f"{now}, at iteration {history.iteration:,}",
        [html_facts(summary_rows(history))],
        images,
    )
