"""Merging of the parts of an array whose documents are shuffled or compared with each other.

Each task writes its part in order, with the records of its documents (``.order``). The merged
dataset is that of a single task over the whole input: parts are merged by the keys of their
documents, and of copies in several parts, the first in the input is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.document_sources.merging import MergedSources
from data_tools.documents import read_dataset_manifest
from data_tools.preprocess.arrangement.arrange import ArrangedDocuments
from data_tools.preprocess.arrangement.arranged_output import ORDER_SUFFIX
from data_tools.preprocess.arrangement.duplicates import find_duplicates
from data_tools.preprocess.arrangement.recount import count_kept
from data_tools.preprocess.arrangement.staged_dataset import StagedDataset
from data_tools.preprocess.selection.document_records import Arrangement
from data_tools.preprocess.selection.removal import DUPLICATES
from data_tools.preprocess.selection.selection import OPTION_NAMES
from data_tools.statistics.counts import (
    CountsByLanguage,
    add_by_source,
    describe_sources,
    read_sources,
)
from data_tools.statistics.removed import (
    RemovedBySource,
    add_removed_by_source,
    describe_removed,
    read_removed,
)
from megatron_llmjp.data.indexed_dataset import DatasetIndex
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.errors import UserError


@dataclass
class ArrayParts:
    """The parts of an array, in order, and the counts of the merged documents."""

    prefixes: Sequence[str]
    datasets: list[StagedDataset]
    arrangement: Arrangement
    _counts: dict[str, CountsByLanguage] = field(default_factory=dict)
    _removed: RemovedBySource = field(default_factory=dict)

    def write(self, writer: IndexedDatasetWriter, sources: MergedSources, folder: Path) -> None:
        """Write the merged documents.

        Args:
            writer: writer of the merged dataset.
            sources: sources of its documents.
            folder: folder for temporary files.
        """
        removed = None
        if self.arrangement.remove_duplicates:
            removed = find_duplicates(self.datasets, folder / "duplicates")
        for number, prefix in enumerate(self.prefixes):
            self._count(number, prefix, None if removed is None else removed[number])
        datasets = [
            replace(dataset, read_sources=sources.reader_of(number))
            for number, dataset in enumerate(self.datasets)
        ]
        documents = ArrangedDocuments.of(datasets, self.arrangement, removed)
        for parts in documents.slice_parts():
            for packed, _, of_documents in parts:
                writer.add(packed.tokens, packed.lengths, packed.sequences)
                sources.add(of_documents)

    def statistics(self) -> dict[str, Any]:
        """Return the manifest's entry ``statistics`` of the documents written."""
        return {**describe_sources(self._counts), **describe_removed(self._removed)}

    def _count(self, number: int, prefix: str, removed: Any) -> None:
        """Add the counts of a part, without the documents that are removed now."""
        manifest = read_dataset_manifest(prefix) or {}
        try:
            counts = read_sources(manifest.get("statistics"))
            add_removed_by_source(self._removed, read_removed(manifest.get("statistics")))
            names = [str(source["name"]) for source in manifest["recipe"]["sources"]]
        except (KeyError, ValueError) as error:
            raise UserError(f"{prefix}.json: the manifest is damaged ({error})") from None
        if removed is None:
            add_by_source(self._counts, counts)
            return
        languages = {at: counts.get(name, {}) for at, name in enumerate(names)}
        kept = count_kept(self.datasets[number], removed, languages)
        for at, name in enumerate(names):
            of_source = kept.get(at)
            self._counts.setdefault(name, {})
            if of_source is not None:
                add_by_source(self._counts, {name: of_source.languages})
                add_removed_by_source(self._removed, {name: {DUPLICATES: of_source.duplicates}})


def read_array_parts(prefixes: Sequence[str], indexes: Sequence[DatasetIndex]) -> ArrayParts | None:
    """Return the parts of an array, or None if they are in the order of the input.

    Raises:
        UserError: they were written with different options, or records are missing.
    """
    first: dict[str, Any] | None = None
    for prefix in prefixes:
        options = ((read_dataset_manifest(prefix) or {}).get("recipe", {})).get("options", {})
        ours = {name: options[name] for name in OPTION_NAMES if name in options}
        if first is not None and ours != first:
            raise UserError(
                f"{prefix} was written with {_describe(ours)}, {prefixes[0]} with "
                f"{_describe(first)}. Write all parts with the same options."
            )
        first = ours
    seed, unique = (first or {}).get("shuffle_seed"), (first or {}).get("remove_duplicates", False)
    if not isinstance(seed, int | None) or not isinstance(unique, bool):
        raise UserError(f"{prefixes[0]}.json: the manifest is damaged (options: {first})")
    arrangement = Arrangement(seed, unique)
    if not arrangement.is_needed:
        return None
    datasets = [
        StagedDataset(index, Path(f"{prefix}{ORDER_SUFFIX}"), arrangement.dtype)
        for prefix, index in zip(prefixes, indexes, strict=True)
    ]
    for dataset in datasets:
        dataset.check()
    return ArrayParts(prefixes, datasets, arrangement)


def _describe(options: dict[str, Any]) -> str:
    named = (f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    return ", ".join(named) or "none of the options on the selection and order of documents"
