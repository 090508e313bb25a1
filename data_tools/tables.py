"""Summary tables of the data tools: aligned text, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.preprocess.job.journal import SourceCounts
from data_tools.statistics.counts import add_by_source, sum_counts
from data_tools.statistics.removed import reasons_in
from megatron_llmjp.errors import UserError
from megatron_llmjp.formatting import format_table

ROWS_SHOWN = 40


def summary_rows(
    names: list[str], counts: list[SourceCounts], keys: list[str]
) -> list[dict[str, Any]]:
    """Return one row per source, and a ``total`` row if there are several."""
    reasons = reasons_in(count.removed for count in counts)
    table: list[dict[str, Any]] = [
        {
            "source": name,
            "documents": count.documents,
            "bytes": count.bytes,
            **{f"tokens_{key}": count.tokens.get(key, 0) for key in keys},
            **_text_sizes(count, keys),
            "rejected": sum(count.rejected.values()),
            "empty": count.empty,
            "blank": count.blank,
            **{reason: count.removed.get(reason, 0) for reason in reasons},
        }
        for name, count in zip(names, counts, strict=True)
    ]
    if len(table) != 1:
        total: dict[str, Any] = {"source": "total"}
        tokens = (f"tokens_{key}" for key in keys)
        for name in ("documents", "bytes", *tokens, "rejected", "empty", "blank", *reasons):
            total[name] = sum(row[name] for row in table)
        whole = SourceCounts()
        for count in counts:
            add_by_source(whole.texts, count.texts)
        total |= _text_sizes(whole, keys)
        table.append({name: total[name] for name in table[0]} if table else total)
    return table


def _text_sizes(count: SourceCounts, keys: Sequence[str]) -> dict[str, Any]:
    """Return the UTF-8 bytes of the text of each key, and bytes per token."""
    sizes: dict[str, Any] = {}
    for key in keys:
        text = sum_counts(count.texts.get(key, {}).values())
        ratio = text.bytes_per_token
        sizes[f"text_bytes_{key}"] = text.bytes or 0
        sizes[f"bytes_per_token_{key}"] = "" if ratio is None else round(ratio, 4)
    return sizes


def format_rows(table: Sequence[dict[str, Any]]) -> str:
    """Return rows as aligned text; in long tables the middle rows are omitted."""
    omitted = max(len(table) - ROWS_SHOWN, 0)
    shown = list(table) if not omitted else [*table[: ROWS_SHOWN - 1], table[-1]]
    heads = list(shown[0])
    cells = [[_cell(row[head]) for head in heads] for row in shown]
    lines = format_table([heads, *cells], right=range(1, len(heads))).split("\n")
    if omitted:
        lines.insert(-1, f"... {omitted} more rows, see the manifest or --report")
    return "\n".join(lines)


def write_table(path: Path, table: Sequence[dict[str, Any]]) -> None:
    """Write rows to a .csv or .json file."""
    check_table_path(path)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            json.dump(list(table), file, indent=1, ensure_ascii=False)
            file.write("\n")
        else:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


def check_table_path(path: Path) -> None:
    """Raise UserError unless the path ends in .csv or .json."""
    if path.suffix not in (".csv", ".json"):
        raise UserError(f"--report {path}: expected a file name ending in .csv or .json")


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
