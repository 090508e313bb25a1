"""The interactive HTML page of one or several runs: self-contained, with a static fallback.

Scripts, styles and data are embedded; a content security policy allows these scripts only, by their
checksums, and no request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files

from megatron_llmjp.report.charts.page_data import page_data, script_json
from megatron_llmjp.report.history import MetricsHistory
from megatron_llmjp.report.html_page import html_page

_PACKAGE = files("megatron_llmjp.report")
_SCRIPTS = ("vendor/uplot/uPlot.iife.min.js", "charts/assets/curves.js", "charts/assets/page.js")
_STYLES = ("vendor/uplot/uPlot.min.css", "charts/assets/charts.css")
_LICENSE = "vendor/uplot/LICENSE"


def interactive_page(
    title: str,
    subtitle: str,
    runs: Sequence[MetricsHistory],
    names: Sequence[str],
    parts: Iterable[str],
    fallback: str,
) -> str:
    """Return a page with charts of all metrics.

    Args:
        title: title and first heading, as text.
        subtitle: line below it, as text.
        runs: the runs.
        names: their names.
        parts: tables below the charts, as HTML.
        fallback: HTML that replaces the charts without JavaScript.
    """
    scripts = [_asset(name) for name in _SCRIPTS]
    styles = "".join(f"<style>{_asset(name)}</style>\n" for name in _STYLES)
    return html_page(
        title,
        subtitle,
        [
            '<div id="charts"></div>',
            f"<noscript>{fallback}</noscript>",
            *parts,
            f"<!-- uPlot\n{_asset(_LICENSE)}-->",
            f'<script type="application/json" id="report-data">'
            f"{script_json(page_data(runs, names))}</script>",
            *(f"<script>{script}</script>" for script in scripts),
        ],
        (),
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n{styles}',
    )


def _asset(name: str) -> str:
    return (_PACKAGE / name).read_text(encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    """Return a policy that allows the given scripts, and neither others nor requests."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"
