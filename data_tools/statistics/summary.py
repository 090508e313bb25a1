"""Summary of datasets: counts of each dataset, source file and language, and of all together.

Counts of source files and languages, and the bytes of the text, come from the manifests that
``preprocess_data`` and ``merge_datasets`` write. Documents, tokens and lengths of other datasets
are read from their indices. Parts that ``preprocess_data --shard`` wrote count as one dataset.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.documents import document_chunks, read_dataset_manifest
from data_tools.statistics.counts import (
    CountsByLanguage,
    TextCounts,
    add_by_language,
    add_by_source,
    document_lengths,
    read_sources,
    sum_counts,
)
from data_tools.statistics.removed import RemovedBySource, add_removed_by_source, read_removed
from megatron_llmjp.data.indexed_dataset import (
    DatasetIndex,
    bin_path,
    read_and_check_index,
    read_index,
)
from megatron_llmjp.formatting import format_names
from megatron_llmjp.tokenizers.registry import describe_identity

_PART = re.compile(r"(?P<start>.+)_part(?P<number>\d{5})of(?P<count>\d{5})_(?P<key>.+_document)")
UNKNOWN_SOURCE = ""
"""Source of documents of datasets without a record of their sources."""


@dataclass
class DatasetSummary:
    """Counts of one dataset, or of the parts of one."""

    name: str
    prefixes: list[str] = field(default_factory=list)
    sequences: int = 0
    token_bytes: int = 0
    """Bytes of the .bin files."""
    dtypes: set[str] = field(default_factory=set)
    tokenizers: set[str] = field(default_factory=set)
    options: list[dict[str, Any]] = field(default_factory=list)
    """Distinct options of ``preprocess_data``."""
    sources: dict[str, CountsByLanguage] = field(default_factory=dict)
    removed: RemovedBySource = field(default_factory=dict)
    """Documents that ``preprocess_data`` removed on request."""

    @property
    def counts(self) -> TextCounts:
        """Counts of all documents."""
        return sum_counts(c for languages in self.sources.values() for c in languages.values())


@dataclass(frozen=True)
class Summary:
    """Counts of several datasets."""

    datasets: tuple[DatasetSummary, ...]
    warnings: tuple[str, ...]

    @property
    def total(self) -> TextCounts:
        """Counts of all datasets."""
        return sum_counts(dataset.counts for dataset in self.datasets)

    @property
    def languages(self) -> CountsByLanguage:
        """Counts by language; an empty string for documents without one."""
        found: CountsByLanguage = {}
        for dataset in self.datasets:
            for languages in dataset.sources.values():
                add_by_language(found, languages)
        return found

    @property
    def has_languages(self) -> bool:
        """Whether the language of any document is known."""
        return any(self.languages.keys() - {""})

    @property
    def has_sources(self) -> bool:
        """Whether the source of any document is known."""
        return any(d.sources.keys() - {UNKNOWN_SOURCE} for d in self.datasets)


def summarize(prefixes: Sequence[str]) -> Summary:
    """Read the counts of datasets.

    Raises:
        UserError: a dataset or its manifest cannot be read.
        DataError: an index is damaged.
    """
    found: dict[str, DatasetSummary] = {}
    prefixes, warnings = _without_merged_parts(prefixes)
    for prefix in _with_progress(prefixes):
        name, _ = _name_and_part(prefix)
        dataset = found.setdefault(name, DatasetSummary(name))
        warnings += _add(dataset, prefix)
    warnings += _missing_parts(prefixes)
    warnings += _counted_twice(found.values())
    datasets = tuple(found.values())
    return Summary(datasets, (*warnings, *_mixed(datasets)))


def _with_progress(prefixes: Sequence[str]) -> Iterable[str]:
    """Return the prefixes, on a terminal with a progress bar."""
    if not sys.stderr.isatty():
        return prefixes
    from tqdm import tqdm  # imported late: it starts a thread

    return tqdm(prefixes, unit=" datasets")


def _name_and_part(prefix: str) -> tuple[str, tuple[int, int] | None]:
    """Return the name of a dataset without the number of its part, and that with the count."""
    match = _PART.fullmatch(prefix)
    if match is None:
        return prefix, None
    return f"{match['start']}_{match['key']}", (int(match["number"]), int(match["count"]))


def _without_merged_parts(prefixes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the datasets without the parts that are merged in another one, and warnings."""
    merged: dict[str, set[str]] = {}
    for name in {name for name, part in map(_name_and_part, prefixes) if part} & {*prefixes}:
        parts = (read_dataset_manifest(name) or {}).get("merged")
        if isinstance(parts, list):
            merged[name] = {str(part).rpartition("/")[2] for part in parts}
    kept = [
        prefix
        for prefix in prefixes
        if prefix.rpartition("/")[2] not in merged.get(_name_and_part(prefix)[0], ())
    ]
    left = len(prefixes) - len(kept)
    text = f"{format_names(sorted(merged))}: {left:,} parts are merged in it and counted once"
    return kept, [text] if left else []


def _missing_parts(prefixes: Iterable[str]) -> Iterator[str]:
    """Warn of datasets of which parts are missing."""
    parts: dict[tuple[str, int], set[int]] = {}
    for name, part in map(_name_and_part, prefixes):
        if part is not None:
            parts.setdefault((name, part[1]), set()).add(part[0])
    for (name, count), numbers in parts.items():
        if missing := [str(number) for number in range(count) if number not in numbers]:
            yield (
                f"{name}: {len(missing):,} of {count:,} parts are missing: "
                f"{' '.join(missing[:20])}{' ...' if len(missing) > 20 else ''}"
            )


def _counted_twice(datasets: Iterable[DatasetSummary]) -> Iterator[str]:
    """Warn of datasets that share a .bin and together have more tokens than it."""
    sharing: dict[tuple[int, int], list[str]] = {}
    for prefix in (prefix for dataset in datasets for prefix in dataset.prefixes):
        status = bin_path(prefix).stat()
        sharing.setdefault((status.st_dev, status.st_ino), []).append(prefix)
    for prefixes in sharing.values():
        indexes = [read_index(prefix) for prefix in prefixes]
        tokens = bin_path(prefixes[0]).stat().st_size // indexes[0].dtype.itemsize
        if len(prefixes) > 1 and sum(index.tokens for index in indexes) > tokens:
            yield (
                f"{format_names(prefixes)} share a .bin of {tokens:,} tokens, some of which are "
                "counted more than once"
            )


def _mixed(datasets: Sequence[DatasetSummary]) -> Iterator[str]:
    tokenizers = sorted({name for dataset in datasets for name in dataset.tokenizers})
    if len(tokenizers) > 1:
        yield (
            f"different tokenizers: {'; '.join(tokenizers)}: numbers of tokens are not comparable"
        )


def _add(dataset: DatasetSummary, prefix: str) -> list[str]:
    """Add the counts of one .bin/.idx to its dataset, and return warnings."""
    index, manifest = read_and_check_index(prefix), read_dataset_manifest(prefix) or {}
    size = bin_path(prefix).stat().st_size
    dataset.prefixes.append(prefix)
    dataset.sequences += index.sequences
    dataset.token_bytes += size
    dataset.dtypes.add(index.dtype.name)
    recipe = manifest.get("recipe", {})
    if tokenizer := recipe.get("tokenizer"):
        dataset.tokenizers.add(describe_identity(tokenizer))
    if (options := recipe.get("options")) and options not in dataset.options:
        dataset.options.append(options)
    with contextlib.suppress(ValueError):
        add_removed_by_source(dataset.removed, read_removed(manifest.get("statistics", {})))
    sources, warnings = _recorded_sources(index, manifest)
    if sources is None:
        sources = {UNKNOWN_SOURCE: {"": count_documents(index)}}
    add_by_source(dataset.sources, sources)
    return warnings


def _recorded_sources(
    index: DatasetIndex, manifest: dict[str, Any]
) -> tuple[dict[str, CountsByLanguage] | None, list[str]]:
    """Return the counts in a manifest if they are those of the dataset, and warnings."""
    if "statistics" not in manifest:
        return None, []
    path = f"{index.prefix}.json"
    try:
        sources = read_sources(manifest["statistics"])
    except ValueError as error:
        return None, [f"{path}: {error}; counted from the index instead"]
    total = sum_counts(counts for languages in sources.values() for counts in languages.values())
    found, recorded = (index.documents, index.tokens), (total.documents, total.tokens)
    if found != recorded:
        return None, [
            f"{path}: its statistics are those of {recorded[0]:,} documents and {recorded[1]:,} "
            f"tokens, the dataset has {found[0]:,} and {found[1]:,}; counted from the index instead"
        ]
    return sources, []


def count_documents(index: DatasetIndex) -> TextCounts:
    """Return the counts of a dataset from its index, in constant memory; bytes are unknown."""
    total = TextCounts(bytes=None)
    for chunk in document_chunks(index):
        total.add(TextCounts.of(document_lengths(chunk.lengths, chunk.sequences), None))
    return total
