"""Contents of samples: their documents with sources and texts, as plain values and as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.document_sources.lookup import Origin, SourceLookup, format_origin
from data_tools.document_sources.original_lines import read_original_lines
from data_tools.run_history import RecordedRun
from data_tools.tables import format_rows

if TYPE_CHECKING:
    from megatron_llmjp.data.lineage import Lineage, SampleOrigin

DocumentKey = tuple[str, int]
"""Path of a dataset and number of a document."""


class BatchSources:
    """Sources of the documents of a batch, and their original lines."""

    def __init__(self, lookup: SourceLookup) -> None:
        self._lookup = lookup
        self.origins: dict[DocumentKey, Origin | None] = {}
        self.lines: dict[DocumentKey, str] = {}
        """Original lines, or why they cannot be read."""

    def describe(self, path: str, document: int) -> dict[str, Any]:
        """Return the entry ``source`` of a document; empty if its dataset has no sources."""
        key = (path, document)
        if key not in self.origins:
            self.origins[key] = self._lookup.origin(path, document)
        origin = self.origins[key]
        return {} if origin is None else {"source": origin.to_json()}

    def format(self, path: str, document: int) -> str:
        """Return lines on the source of a document, and its original line if it was read."""
        key = (path, document)
        origin = self.origins.get(key)
        lines = [] if origin is None else [f"source: {format_origin(origin)}"]
        if key in self.lines:
            lines.append(f"line: {self.lines[key]}")
        return "".join(f"{line}\n" for line in lines)

    def read_lines(self, root: Path | None) -> None:
        """Read the original lines of all documents with sources."""
        known = [(key, origin) for key, origin in self.origins.items() if origin is not None]
        found = read_original_lines([origin for _, origin in known], root)
        for (key, _), line in zip(known, found, strict=True):
            if isinstance(line, bytes):
                self.lines[key] = line.decode(errors="replace")
            else:
                self.lines[key] = f"(not read: {line})"

    def add_lines(self, batch: Sequence[dict[str, Any]]) -> None:
        """Add the original lines to a batch, as ``source_line``."""
        for part in (part for entry in batch for part in entry["documents"]):
            if (line := self.lines.get((part["path"], part["document"]))) is not None:
                part["source_line"] = line


def describe_sample(
    run: RecordedRun,
    lineage: Lineage,
    position: int,
    replicas: int | None,
    sources: BatchSources,
) -> dict[str, Any]:
    """Return the origin of one sample, with its documents' tokens and sources, as plain values."""
    from megatron_llmjp.data.lineage import read_tokens

    origin = lineage.origin(position)
    return {
        "sample": origin.number,
        "position": origin.position,
        "fold": origin.fold,
        "epoch": origin.epoch,
        **place_in_batch(run, origin, replicas),
        "documents": [
            {
                "dataset": span.dataset,
                "path": span.path,
                "document": span.document,
                "first_token": span.first_token,
                "tokens": read_tokens(span).tolist(),
                **sources.describe(span.path, span.document),
            }
            for span in origin.spans
        ],
    }


def place_in_batch(
    run: RecordedRun, origin: SampleOrigin, replicas: int | None
) -> dict[str, int | None]:
    """Return the iteration, data-parallel rank and micro-batch of a sample (the latter two from 0).

    Micro-batch k of a run without data parallelism goes to rank k mod d (``data/dataloader.py``).
    """
    if origin.number is None:
        return {"iteration": None, "data_parallel_rank": None, "micro_batch": None}
    iteration = run.sizes.iteration_of(origin.number)
    inside = origin.number - run.sizes.consumed_after(iteration - 1)
    micro_batch, rank = divmod(inside // run.config.training.micro_batch_size, replicas or 1)
    known = replicas is not None
    return {
        "iteration": iteration,
        "data_parallel_rank": rank if known else None,
        "micro_batch": micro_batch if known else None,
    }


def print_batch(
    run: RecordedRun,
    iteration: int | None,
    batch: Sequence[dict[str, Any]],
    sources: BatchSources,
    max_tokens: int,
) -> None:
    """Print samples, and a summary if they are those of an iteration.

    Args:
        run: the run.
        iteration: the iteration; None for single samples.
        batch: the samples, from :func:`describe_sample`.
        sources: sources of their documents.
        max_tokens: number of tokens printed per document.
    """
    if iteration is not None:
        print(
            f"iteration {iteration:,}: samples {batch[0]['sample']:,} to "
            f"{batch[-1]['sample']:,}, according to {run.folder}\n{format_rows(_summary(batch))}"
        )
    for entry in batch:
        print(f"\n{_heading(entry)}")
        for part in entry["documents"]:
            print(_format_document(run, part, sources, max_tokens))


def _summary(batch: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return samples, documents and tokens of a batch by fold and dataset, the largest first."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in batch:
        for number, part in enumerate(entry["documents"]):
            key = (entry["fold"], part["dataset"])
            empty = {"fold": key[0], "dataset": key[1], "samples": 0, "documents": 0, "tokens": 0}
            row = rows.setdefault(key, empty)
            row["samples"] += number == 0
            row["documents"] += 1
            row["tokens"] += len(part["tokens"])
    return sorted(rows.values(), key=lambda row: -int(row["tokens"]))


def _heading(entry: dict[str, Any]) -> str:
    if entry["sample"] is None:
        return f"--- position {entry['position']:,}, fold '{entry['fold']}': skipped"
    words = [f"--- sample {entry['sample']:,}", f"iteration {entry['iteration']:,}"]
    words.append(f"fold '{entry['fold']}'")
    if entry["position"] != entry["sample"]:
        words.insert(1, f"position {entry['position']:,}")
    if entry["epoch"] is not None:
        words.append(f"epoch {entry['epoch']}")
    if entry["data_parallel_rank"] is not None:
        words.append(f"micro-batch {entry['micro_batch']} of data-parallel rank")
        words[-1] += f" {entry['data_parallel_rank']}"
    return ", ".join(words)


def _format_document(
    run: RecordedRun, part: dict[str, Any], sources: BatchSources, max_tokens: int
) -> str:
    ids = part["tokens"]
    shown = ids[:max_tokens]
    text = run.tokenizer.decode(shown) if run.tokenizer else " ".join(map(str, shown))
    cut = f", the first {max_tokens:,} shown" if len(ids) > max_tokens else ""
    first = part["first_token"]
    return (
        f"{part['dataset']} document {part['document']:,}, tokens {first:,} to "
        f"{first + len(ids) - 1:,}{cut}:\n{sources.format(part['path'], part['document'])}{text}"
    )
