"""Self-contained HTML pages with tables and embedded plots, for any width, light and dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = "charts/assets/page.css"
"""Style sheet of all pages, in this package."""


def html_page(
    title: str, subtitle: str, parts: Iterable[str], images: Iterable[str], head: str = ""
) -> str:
    """Return a page: headings, parts of HTML, and a grid of images, the first of full width.

    Args:
        title: title and first heading, as text.
        subtitle: line below it, as text.
        parts: the content, as HTML.
        images: ``img`` elements.
        head: further elements of the page's head.
    """
    name = html.escape(title)
    style = (files("megatron_llmjp.report") / _STYLE).read_text(encoding="utf-8")
    content = "\n".join([*parts, image_grid(images)])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
{head}<style>{style}</style></head>
<body><h1>{name}</h1><p class="when">{html.escape(subtitle)}</p>
{content}
</body></html>
"""


def image_grid(images: Iterable[str]) -> str:
    """Return a grid of images; empty without any."""
    plots = "\n".join(images)
    return f'<main class="images">\n{plots}\n</main>' if plots else ""


def html_facts(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of labels and values."""
    lines = "\n".join(
        f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"
        for label, value in rows
    )
    return f'<div class="scroll"><table class="facts">\n{lines}\n</table></div>'


def html_table(heads: Iterable[str], rows: Iterable[Iterable[str]], style: str = "numbers") -> str:
    """Return a table with a heading per column, which scrolls if it is wider than the page.

    Args:
        heads: the headings.
        rows: the cells.
        style: ``numbers`` aligns all but the first column to the right, ``texts`` to the left.
    """
    first = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = (
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = "\n".join([f"<tr>{first}</tr>", *lines])
    return f'<div class="scroll"><table class="{style}">\n{table}\n</table></div>'


def embedded_image(figure: Figure, title: str) -> str:
    """Return a plot as an embedded image, which keeps the ids of its SVG elements separate."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # imported late, as in the report

    stream = io.BytesIO()
    # savefig would draw it twice.
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'
