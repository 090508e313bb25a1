"""The report of a run: one self-contained HTML page, and its plots as PNG files."""

from __future__ import annotations

import base64
import html
import io
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.report.history import MetricsHistory, read_history
from megatron_llmjp.report.summary import summary_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


REPORT_FOLDER = "report"
"""Name of the report's folder in the save folder."""

REPORT_FILE = "report.html"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #333; margin: 2rem auto; max-width: 75rem;
       padding: 0 1rem; background: #fff; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; }
p.when { color: #777; margin-top: 0; }
table { border-collapse: collapse; margin: 1rem 0 1.5rem; }
th { text-align: left; font-weight: 600; color: #555; padding: .2rem 1.5rem .2rem 0;
     vertical-align: top; white-space: nowrap; }
td { padding: .2rem 0; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
main img { width: 100%; height: auto; border: 1px solid #eee; border-radius: 4px; }
main img:first-child { grid-column: 1 / -1; }
"""


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
            images.append(_image(figure, title))
            plot = output / f"{name}.png"
            figure.savefig(plot, dpi=130)
            files.append(plot)
    page = output / REPORT_FILE
    write_atomically(page, _page(history, images))
    return [page, *files]


def _page(history: MetricsHistory, images: list[str]) -> str:
    name = html.escape(history.folder.resolve().name)
    rows = "\n".join(
        f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"
        for label, value in summary_rows(history)
    )
    now = time.strftime("%Y-%m-%d %H:%M")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head>
<body><h1>{name}</h1><p class="when">{now}, at iteration {history.iteration:,}</p>
<table>
{rows}
</table>
<main>
{chr(10).join(images)}
</main></body></html>
"""


def _image(figure: Figure, title: str) -> str:
    """Return a plot as an embedded image, which keeps the ids of its SVG elements separate."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'
