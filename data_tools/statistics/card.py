"""Data cards: Markdown with the metadata of Hugging Face dataset cards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from data_tools.statistics.counts import TextCounts, named_bins
from data_tools.statistics.summary import Summary
from data_tools.statistics.tables import count_cells, removed_rows, summary_rows

_SIZES = (
    (1e3, "n<1K"),
    (1e4, "1K<n<10K"),
    (1e5, "10K<n<100K"),
    (1e6, "100K<n<1M"),
    (1e7, "1M<n<10M"),
    (1e8, "10M<n<100M"),
    (1e9, "100M<n<1B"),
    (1e10, "1B<n<10B"),
    (1e11, "10B<n<100B"),
    (1e12, "100B<n<1T"),
)
"""``size_categories`` of the Hugging Face Hub, by number of documents."""
_HEADS = ("documents", "tokens", "bytes", "bytes per token", "tokens per document", "longest")
_LEVELS = (("dataset", "Datasets"), ("language", "Languages"), ("source", "Source files"))


def format_card(summary: Summary) -> str:
    """Return a data card: sizes by dataset, language and source, tokenizers, document lengths."""
    rows = list(summary_rows(summary))
    title = Path(summary.datasets[0].name).name
    title = title if len(summary.datasets) == 1 else f"{len(summary.datasets):,} datasets"
    sections = ["# Data card: " + _escape(title), _table("", [("total", rows[0][1])])]
    for level, heading in _LEVELS:
        of_level = [
            (key.get(level) or "(unknown)", counts) for key, counts in rows if key["by"] == level
        ]
        if of_level:
            sections += [f"## {heading}", _table(level, of_level)]
    sections += ["## Documents by length", _length_table(summary.total)]
    if removed := removed_rows(summary):
        rows_of_sources = [[_cell(value) for value in row.values()] for row in removed]
        table = markdown_table(removed[0], rows_of_sources)
        sections += ["## Documents removed at preprocessing", table]
    sections += ["## Preparation", "\n".join(_preparation(summary))]
    if summary.warnings:
        sections += ["## Warnings", "\n".join(f"- {_escape(text)}" for text in summary.warnings)]
    return f"---\n{_metadata(summary, title)}---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(summary: Summary, title: str) -> str:
    documents = summary.total.documents
    size = next((name for limit, name in _SIZES if documents < limit), "n>1T")
    languages = sorted(n for n in summary.languages if re.fullmatch(r"[a-z]{2,3}", n))
    content: dict[str, Any] = {"pretty_name": title}
    if languages:
        content["language"] = languages
    content |= {"size_categories": [size], "task_categories": ["text-generation"]}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _table(head: str, rows: Iterable[tuple[str, TextCounts]]) -> str:
    cells = [
        (name, *(_cell(value) for value in count_cells(counts).values())) for name, counts in rows
    ]
    return markdown_table((head, *_HEADS), cells)


def _length_table(counts: TextCounts) -> str:
    total = max(counts.documents, 1)
    rows = [
        (name, f"{count:,}", f"{count / total:.2%}")
        for name, count in named_bins(counts.histogram).items()
    ]
    return markdown_table(("tokens", "documents", "share"), rows)


def _preparation(summary: Summary) -> Iterator[str]:
    """Yield a line for each distinct tokenizer, set of options and dtype."""
    tokenizers = {name for dataset in summary.datasets for name in dataset.tokenizers}
    yield from (f"- tokenizer: {_escape(name)}" for name in sorted(tokenizers) or ["unknown"])
    options = {
        ", ".join(f"{name} {value}" for name, value in given.items())
        for dataset in summary.datasets
        for given in dataset.options
    }
    yield from (f"- options of preprocess_data: {_escape(text)}" for text in sorted(options))
    dtypes = {name for dataset in summary.datasets for name in dataset.dtypes}
    size = sum(dataset.token_bytes for dataset in summary.datasets)
    yield f"- stored as {', '.join(sorted(dtypes))}, {size:,} bytes in .bin files"


def markdown_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; all but the first column are right-aligned."""
    names = list(heads)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *([*row] for row in rows)]
    return "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"


def _escape(text: str) -> str:
    return re.sub(r"([|*_`<\[])", r"\\\1", text).replace("\n", " ") if text != "---" else text
