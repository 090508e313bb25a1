"""Counts of the documents that are left when duplicates are removed, by source and language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.documents import document_chunks
from data_tools.preprocess.arrangement.staged_dataset import StagedDataset
from data_tools.preprocess.encoding.text_counts import OTHER_LANGUAGES
from data_tools.preprocess.selection.document_records import language_hash
from data_tools.statistics.counts import CountsByLanguage, TextCounts, document_lengths, sum_counts


@dataclass
class KeptDocuments:
    """Counts of one source.

    Attributes:
        languages: counts of the documents that are kept, by language.
        duplicates: number of the others.
    """

    languages: CountsByLanguage = field(default_factory=dict)
    duplicates: int = 0

    @property
    def total(self) -> TextCounts:
        """Counts of all languages."""
        return sum_counts(self.languages.values())


def count_kept(
    dataset: StagedDataset,
    removed: npt.NDArray[Any],
    names: Mapping[int, Mapping[str, Any]],
) -> dict[int, KeptDocuments]:
    """Return the counts of each source with documents, by its number.

    Args:
        dataset: the dataset, with languages and sizes in its records.
        removed: 1 for each document that is removed, otherwise 0.
        names: the languages of each source, as they are counted.
    """
    known = {
        source: {language_hash(name): name for name in languages}
        for source, languages in names.items()
    }
    found: dict[int, KeptDocuments] = {}
    for chunk in document_chunks(dataset.index):
        end = chunk.first + len(chunk.sequences)
        records = dataset.records(chunk.first, end)
        lengths = document_lengths(chunk.lengths, chunk.sequences)
        is_removed = removed[chunk.first : end] != 0
        order = np.lexsort((records["language"], records["source"]))
        sources, languages = records["source"][order], records["language"][order]
        changes = (sources[1:] != sources[:-1]) | (languages[1:] != languages[:-1])
        for group in np.split(order, np.flatnonzero(changes) + 1):
            if not len(group):
                continue
            first = records[group[0]]
            of_source = found.setdefault(int(first["source"]), KeptDocuments())
            kept = group[~is_removed[group]]
            of_source.duplicates += len(group) - len(kept)
            if not len(kept):
                continue
            by_hash = known.get(int(first["source"]), {})
            name = by_hash.get(int(first["language"]), OTHER_LANGUAGES)
            counts = of_source.languages.setdefault(name, TextCounts())
            counts.add(TextCounts.of(lengths[kept], int(records["bytes"][kept].sum())))
    return found
