"""Self-contained HTML pages with tables and embedded plots."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #333; margin: 2rem auto; max-width: 75rem;
       padding: 0 1rem; background: #fff; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .2rem; }
p.when { color: #777; margin-top: 0; }
table { border-collapse: collapse; margin: 1rem 0 1.5rem; }
th { text-align: left; font-weight: 600; color: #555; padding: .2rem 1.5rem .2rem 0;
     vertical-align: top; white-space: nowrap; }
td { padding: .2rem 0; }
table.numbers th, table.numbers td { padding: .2rem 1.5rem .2rem 0; text-align: right; }
table.numbers th:first-child, table.numbers td:first-child { text-align: left; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
main img { width: 100%; height: auto; border: 1px solid #eee; border-radius: 4px; }
main img:first-child { grid-column: 1 / -1; }
"""


def html_page(title: str, subtitle: str, parts: Iterable[str], images: Iterable[str]) -> str:
    """Return a page: headings, parts of HTML, and a grid of images, the first of full width."""
    name = html.escape(title)
    content, plots = "\n".join(parts), "\n".join(images)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head>
<body><h1>{name}</h1><p class="when">{html.escape(subtitle)}</p>
{content}
<main>
{plots}
</main></body></html>
"""


def html_facts(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of labels and values."""
    lines = "\n".join(
        f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"
        for label, value in rows
    )
    return f"<table>\n{lines}\n</table>"


def html_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table with a heading per column; all but the first column are right-aligned."""
    first = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = (
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return '<table class="numbers">\n' + "\n".join([f"<tr>{first}</tr>", *lines]) + "\n</table>"


def embedded_image(figure: Figure, title: str) -> str:
    """Return a plot as an embedded image, which keeps the ids of its SVG elements separate."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'
