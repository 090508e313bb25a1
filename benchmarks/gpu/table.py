"""The results as Markdown, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STATUS = {
    "done": "",
    "failed": "**failed**: ",
    "time limit": "**ended at its time limit**: ",
    "skipped": "not measured: ",
}


def to_markdown(report: Mapping[str, Any]) -> str:
    """Format the report that ``benchmarks.gpu`` writes as JSON."""
    parts: Mapping[str, Mapping[str, Any]] = report["parts"]
    lines = [_origin(report), ""]
    for part in parts.values():
        lines += [f"### {part['title']}", ""]
        if part["status"] != "done":
            lines += [f"{STATUS[part['status']]}{part['message']}", ""]
        lines += [line for note in part.get("notes", ()) for line in (f"{_cell(note)}.", "")]
        for name, rows in part.get("tables", {}).items():
            lines += [f"{name[0].upper()}{name[1:]}:", "", *_table(rows), ""]
    return "\n".join(lines)


def _origin(report: Mapping[str, Any]) -> str:
    """Return the sentence that says where and from what the numbers are."""
    changed = " with uncommitted changes" if report["uncommitted changes"] else ""
    text = (
        f"Made on {report['machine']}, {report['started']}, in {report['seconds']:.0f} s, of "
        f"commit `{report['commit'][:12]}`{changed}."
    )
    if report["device"] == "cpu":
        text += " **On a CPU: this shows that the program works, and nothing about a GPU.**"
    if report["scale"] != "full":
        text += f" Scale `{report['scale']}`: the models are shrunk."
    return text


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format rows; a column for every key, in the order of their first use."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return " ".join(str(value).split()).replace("|", "\\|")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
