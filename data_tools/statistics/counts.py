"""Counts of a set of documents, and histograms of their lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

HISTOGRAM_BINS = 40
"""Documents with 0, 1, 2-3, 4-7 ... tokens, up to 2^39 - 1."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Histogram = Annotated[list[Count], Field(max_length=HISTOGRAM_BINS)]


@dataclass
class TextCounts:
    """Counts of documents.

    Attributes:
        documents: number of documents.
        tokens: tokens of all documents, including EOD and BOS tokens.
        bytes: UTF-8 bytes of the text; None if unknown.
        longest: tokens of the longest document.
        histogram: documents by length in tokens, without empty bins at the end.
    """

    documents: Count = 0
    tokens: Count = 0
    bytes: Count | None = 0
    longest: Count = 0
    histogram: Histogram = field(default_factory=list)

    @classmethod
    def of(cls, lengths: npt.NDArray[Any], size: int | None) -> TextCounts:
        """Return the counts of documents with these ``lengths`` in tokens and ``size`` in bytes."""
        if not len(lengths):
            return cls(bytes=size)
        return cls(
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            bytes=size,
            longest=int(lengths.max()),
            histogram=length_histogram(lengths).tolist(),
        )

    def add(self, other: TextCounts) -> None:
        """Add the counts of other documents."""
        self.documents += other.documents
        self.tokens += other.tokens
        known = self.bytes is not None and other.bytes is not None
        self.bytes = (self.bytes or 0) + (other.bytes or 0) if known else None
        self.longest = max(self.longest, other.longest)
        more = len(other.histogram) - len(self.histogram)
        self.histogram += [0] * more
        for at, count in enumerate(other.histogram):
            self.histogram[at] += count

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per token; None if unknown."""
        return self.bytes / self.tokens if self.bytes is not None and self.tokens else None

    @property
    def tokens_per_document(self) -> float | None:
        """Mean length of a document; None without documents."""
        return self.tokens / self.documents if self.documents else None


CountsByLanguage = dict[str, TextCounts]
"""By language; the empty string for documents without one."""

_SOURCES = TypeAdapter(dict[str, CountsByLanguage], config={"extra": "forbid"})


def sum_counts(several: Iterable[TextCounts]) -> TextCounts:
    """Return the sum of several counts."""
    total = TextCounts()
    for counts in several:
        total.add(counts)
    return total


def add_by_language(total: CountsByLanguage, more: Mapping[str, TextCounts]) -> None:
    """Add counts by language to others."""
    for language, counts in more.items():
        total.setdefault(language, TextCounts()).add(counts)


def add_by_source(
    total: dict[str, CountsByLanguage], more: Mapping[str, Mapping[str, TextCounts]]
) -> None:
    """Add counts by source and language to others."""
    for source, languages in more.items():
        add_by_language(total.setdefault(source, {}), languages)


def describe_sources(sources: Mapping[str, Mapping[str, TextCounts]]) -> dict[str, Any]:
    """Return a manifest's entry ``statistics``: counts by source and language, as plain values."""
    return {
        "sources": {
            name: {language: asdict(counts) for language, counts in sorted(languages.items())}
            for name, languages in sources.items()
        }
    }


def read_sources(statistics: Any) -> dict[str, CountsByLanguage]:
    """Return the counts by source and language in a manifest's entry ``statistics``.

    Raises:
        ValueError: the entry has another form.
    """
    sources = statistics.get("sources") if isinstance(statistics, dict) else None
    try:
        return _SOURCES.validate_python(sources)
    except ValidationError as error:
        raise ValueError(f"statistics: {error.errors()[0]['msg']}") from None


def document_lengths(
    lengths: npt.NDArray[np.int32], sequences: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Return the tokens per document from tokens per sequence and sequences per document."""
    totals = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    ends = np.cumsum(sequences, dtype=np.int64)
    return np.diff(totals[np.concatenate(([0], ends))])


def length_histogram(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Count documents by length in tokens, in bins of powers of two."""
    bins = np.where(lengths > 0, np.log2(np.maximum(lengths, 1)).astype(int) + 1, 0)
    return np.bincount(bins)[:HISTOGRAM_BINS]


def bin_name(number: int) -> str:
    """Return the range of lengths of a bin: ``0``, ``1``, ``2-3``, ``4-7`` ..."""
    return str(number) if number < 2 else f"{2 ** (number - 1):,}-{2**number - 1:,}"


def named_bins(histogram: npt.NDArray[np.int64] | list[int]) -> dict[str, int]:
    """Return the non-empty range of a histogram, keyed by the length range of each bin."""
    filled = [at for at, count in enumerate(histogram) if count]
    if not filled:
        return {}
    return {bin_name(at): int(histogram[at]) for at in range(filled[0], filled[-1] + 1)}
