"""Summaries as rows, text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from data_tools.statistics.counts import TextCounts, bin_name, named_bins, sum_counts
from data_tools.statistics.removed import reasons_in, sum_removed
from data_tools.statistics.summary import Summary
from data_tools.tables import format_rows
from megatron_llmjp.formatting import format_table

BAR_WIDTH = 40
_KEYS = ("by", "dataset", "source", "language")


def summary_rows(summary: Summary) -> Iterator[tuple[dict[str, str], TextCounts]]:
    """Yield the keys and counts of each row: total, datasets, languages, sources.

    ``by`` says what a row counts. Rows of ``source and language`` follow if languages are known.
    """
    yield {"by": "total"}, summary.total
    for dataset in summary.datasets:
        yield {"by": "dataset", "dataset": dataset.name}, dataset.counts
    if summary.has_languages:
        for language, counts in summary.languages.items():
            yield {"by": "language", "language": language}, counts
    for by_language in (False, True):
        if not summary.has_sources or (by_language and not summary.has_languages):
            continue
        for dataset in summary.datasets:
            for source, languages in dataset.sources.items():
                key = {"by": "source", "dataset": dataset.name, "source": source}
                if not by_language:
                    yield key, sum_counts(languages.values())
                    continue
                for language, counts in languages.items():
                    yield {**key, "by": "source and language", "language": language}, counts


def count_cells(counts: TextCounts) -> dict[str, Any]:
    """Return the counts as a flat row; None for unknown values."""
    ratio, mean = counts.bytes_per_token, counts.tokens_per_document
    return {
        "documents": counts.documents,
        "tokens": counts.tokens,
        "bytes": counts.bytes,
        "bytes_per_token": None if ratio is None else round(ratio, 4),
        "tokens_per_document": None if mean is None else round(mean, 1),
        "longest": counts.longest,
    }


def removed_rows(summary: Summary) -> list[dict[str, Any]]:
    """Return the documents removed at preprocessing, a row per source; empty if unknown."""
    reasons = reasons_in(r for dataset in summary.datasets for r in dataset.removed.values())
    several = len(summary.datasets) > 1
    return [
        {
            **({"dataset": dataset.name} if several else {}),
            "source": source,
            **{reason.replace("_", " "): removed.get(reason, 0) for reason in reasons},
        }
        for dataset in summary.datasets
        for source, removed in dataset.removed.items()
        if reasons
    ]


def format_summary(summary: Summary) -> str:
    """Return the summary as text tables, with a histogram of all document lengths."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, counts in summary_rows(summary):
        name = key.get("language") if key["by"] == "language" else key.get("source")
        name = key.get("dataset", "total") if name is None else name
        row = {key["by"]: name or "(unknown)"}
        if key["by"] == "source and language":
            row = {"source": name or "(unknown)", "language": key["language"] or "(unknown)"}
        cells = {
            head: "" if value is None else value for head, value in count_cells(counts).items()
        }
        groups.setdefault(key["by"], []).append({**row, **cells})
    if len(summary.datasets) == 1:
        groups.pop("total")
    texts = [format_rows(rows) for rows in groups.values()]
    if removed := removed_rows(summary):
        texts.append(f"documents removed at preprocessing\n{format_rows(removed)}")
    lines = [f"documents by length in tokens\n{draw_histogram(summary.total.histogram)}"]
    return "\n\n".join([*texts, *lines])


def draw_histogram(histogram: list[int]) -> str:
    """Return a histogram of document lengths as a text chart."""
    named = named_bins(histogram)
    largest = max(named.values(), default=1)
    rows = [
        (name, "█" * round(BAR_WIDTH * count / largest), f"{count:,}")
        for name, count in named.items()
    ]
    return format_table(rows, right=(0, 2)) if rows else "(no documents)"


def format_csv(summary: Summary) -> str:
    """Return all rows as CSV, with a column for each bin of the length histogram."""
    rows = list(summary_rows(summary))
    bins = [f"length {bin_name(at)}".replace(",", "") for at in range(len(summary.total.histogram))]
    reasons = reasons_in(r for dataset in summary.datasets for r in dataset.removed.values())
    stream = io.StringIO()
    heads = [*_KEYS, *count_cells(TextCounts()), *(f"removed {r}" for r in reasons), *bins]
    writer = csv.DictWriter(stream, heads, restval="")
    writer.writeheader()
    for key, counts in rows:
        lengths = dict(zip(bins, [*counts.histogram, *[0] * len(bins)], strict=False))
        removed = _removed_cells(summary, key) if reasons else {}
        writer.writerow({**key, **count_cells(counts), **removed, **lengths})
    return stream.getvalue()


def _removed_cells(summary: Summary, key: dict[str, str]) -> dict[str, int]:
    """Return the removed documents of a row by total, dataset or source; empty for others."""
    if key["by"] not in ("total", "dataset", "source"):
        return {}
    chosen = (
        removed
        for dataset in summary.datasets
        if key.get("dataset", dataset.name) == dataset.name
        for source, removed in dataset.removed.items()
        if key.get("source", source) == source
    )
    return {f"removed {reason}": count for reason, count in sum_removed(chosen).items()}


def format_json(summary: Summary) -> str:
    """Return all rows as JSON, with histograms by range of lengths, and warnings."""
    rows = [
        {**key, **count_cells(counts), "histogram": named_bins(counts.histogram)}
        for key, counts in summary_rows(summary)
    ]
    content = {
        "rows": rows,
        "datasets": [
            {
                "name": dataset.name,
                "prefixes": dataset.prefixes,
                "sequences": dataset.sequences,
                "token_bytes": dataset.token_bytes,
                "dtypes": sorted(dataset.dtypes),
                "tokenizers": sorted(dataset.tokenizers),
                "options": dataset.options,
                **({"removed": dataset.removed} if dataset.removed else {}),
            }
            for dataset in summary.datasets
        ],
        "warnings": list(summary.warnings),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
