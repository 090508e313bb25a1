"""Sources of the documents of merged and divided datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.document_sources.columns import NO_OFFSET, DocumentSources, ReadSources
from data_tools.document_sources.sources_file import (
    MANIFEST_ENTRY,
    SUFFIX,
    SourcesFile,
    SourcesFileWriter,
)
from data_tools.documents import read_dataset_manifest
from megatron_llmjp.errors import UserError

File = dict[str, Any]
DOCUMENTS_PER_CHUNK = 1 << 16


def open_sources(prefix: str | Path, documents: int) -> SourcesFile | None:
    """Open the sources that a dataset's manifest declares; None if it declares none.

    Raises:
        UserError: the file is missing, damaged, or of another dataset.
    """
    declared = (read_dataset_manifest(prefix) or {}).get(MANIFEST_ENTRY)
    if declared is None:
        return None
    found = SourcesFile(Path(f"{prefix}{SUFFIX}"))
    if found.documents != documents:
        raise UserError(
            f"{found.path}: has the sources of {found.documents:,} documents, but the dataset has "
            f"{documents:,}: they belong to different datasets. Write the dataset again."
        )
    return found


class MergedFiles:
    """List of the files of several datasets, in which the parts of a file are one entry."""

    def __init__(self, parts: Sequence[Sequence[File]], lengths: Sequence[Sequence[File]]) -> None:
        """Combine the files of datasets.

        Args:
            parts: the files of each dataset.
            lengths: lines and bytes of text of all parts of an array, by which the places of parts
                in their files are known: ``name``, ``start``, ``lines``, ``bytes``, for each
                dataset; empty if the datasets are not an array.
        """
        self.files: list[File] = []
        self._places: list[list[tuple[int, int, int]]] = []
        known: dict[str, int] = {}
        before = _lengths_before(lengths)
        for files in parts:
            places = []
            for file in files:
                entry, line, offset = _whole_file(file, before)
                key = json.dumps(entry, sort_keys=True)
                if key not in known:
                    known[key] = len(self.files)
                    self.files.append(entry)
                places.append((known[key], line, offset))
            self._places.append(places)

    def place(self, number: int, sources: DocumentSources) -> DocumentSources:
        """Return sources of documents of dataset ``number`` with the files of the merged list."""
        places = np.array(self._places[number], np.int64).reshape(-1, 3)[sources.file]
        offset = np.where(sources.offset == NO_OFFSET, NO_OFFSET, sources.offset + places[:, 2])
        return replace(sources, file=places[:, 0], line=sources.line + places[:, 1], offset=offset)


def _lengths_before(lengths: Sequence[Sequence[File]]) -> dict[tuple[str, int], tuple[int, int]]:
    """Return the lines and bytes of text before each part of a file, by name and first byte."""
    parts = sorted(
        ((str(p["name"]), int(p["start"]), p) for of_one in lengths for p in of_one),
        key=lambda part: part[:2],
    )
    before: dict[tuple[str, int], tuple[int, int]] = {}
    name, lines, size = "", 0, 0
    for of_file, start, part in parts:
        if of_file != name:
            name, lines, size = of_file, 0, 0
        before[of_file, start] = (lines, size)
        lines, size = lines + int(part["lines"]), size + int(part["bytes"])
    return before


def _whole_file(
    file: File, before: dict[tuple[str, int], tuple[int, int]]
) -> tuple[File, int, int]:
    """Return the entry of a file, and what to add to lines and offsets of a part of it."""
    if "bytes" not in file:
        return file, 0, 0
    place = before.get((str(file.get("name")), int(file["bytes"][0])))
    if place is None:
        return file, 0, 0
    whole = {k: v for k, v in file.items() if k not in ("bytes", "first_line", "first_offset")}
    line = place[0] if file["first_line"] is None else 0
    return whole, line, place[1] if file["first_offset"] is None else 0


def part_lengths(prefix: str) -> list[File]:
    """Return lines and bytes of text of each input file of a part of an array.

    Raises:
        UserError: its manifest is damaged.
    """
    manifest = read_dataset_manifest(prefix) or {}
    try:
        return [
            {
                "name": source["name"],
                "start": source.get("bytes", [0])[0],
                "lines": int(counts["lines"]),
                "bytes": int(counts["bytes"]),
            }
            for source, counts in zip(
                manifest["recipe"]["sources"], manifest["tallies"], strict=True
            )
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{prefix}.json: the manifest is damaged ({error!r})") from error


class MergedSources:
    """Sources of the documents of a merged dataset, written as the documents are."""

    def __init__(
        self, prefixes: Sequence[str], documents: Sequence[int], is_array: bool, folder: Path
    ) -> None:
        """Open the sources of datasets.

        Args:
            prefixes: the datasets.
            documents: number of documents of each.
            is_array: the datasets are all parts of an array.
            folder: the folder of the merged dataset.

        Raises:
            UserError: a file of sources is missing or damaged.
        """
        self.readers = [open_sources(p, n) for p, n in zip(prefixes, documents, strict=True)]
        self._documents = documents
        pairs = list(zip(prefixes, self.readers, strict=True))
        without = [prefix for prefix, reader in pairs if reader is None]
        is_recorded = len(without) < len(pairs)
        if is_array and is_recorded and without:
            raise UserError(
                f"{without[0]} has no document sources, other parts have. Write all parts with "
                "--record-sources, or all without."
            )
        files = [[{"dataset": p}] if r is None else r.files for p, r in pairs]
        is_located = is_array and is_recorded
        self._files = MergedFiles(files, [part_lengths(p) for p in prefixes] if is_located else [])
        self._path = folder / f"merged{SUFFIX}"
        self._writer = SourcesFileWriter(self._path) if is_recorded else None

    def reader_of(self, number: int) -> ReadSources | None:
        """Return the reader of a dataset's sources, with the files of the merged dataset."""
        reader = self.readers[number]
        if reader is None:
            return None
        return lambda first, end: self._files.place(number, reader.read(first, end))

    def add(self, sources: DocumentSources | None) -> None:
        """Append the sources of documents, with the files of the merged dataset."""
        if self._writer is not None and sources is not None:
            self._writer.add(sources)

    def concatenate(self) -> None:
        """Append all documents of all datasets.

        A document of a dataset without sources gets its dataset and number.
        """
        if self._writer is None:
            return
        for number, (reader, documents) in enumerate(
            zip(self.readers, self._documents, strict=True)
        ):
            for chunk in _numbered(documents) if reader is None else _chunks(reader):
                self.add(self._files.place(number, chunk))

    def finish(self) -> dict[str, Any]:
        """Write the file, and return the manifest's entry on it; empty if there are no sources."""
        if self._writer is None:
            return {}
        return {MANIFEST_ENTRY: self._writer.finish(self._files.files)}


def _numbered(documents: int) -> Iterator[DocumentSources]:
    for first in range(0, documents, DOCUMENTS_PER_CHUNK):
        lines = range(first, min(first + DOCUMENTS_PER_CHUNK, documents))
        yield DocumentSources.of_lines(lines, None, [])


def _chunks(reader: SourcesFile) -> Iterator[DocumentSources]:
    for _, sources in reader.chunks():
        yield sources


def write_selected(
    reader: SourcesFile, documents: npt.NDArray[np.int64], path: Path
) -> dict[str, Any]:
    """Write the sources of selected documents, and return the manifest's entry.

    Args:
        reader: the sources of all documents.
        documents: the numbers of the selected ones, ascending.
        path: the file to write.
    """
    writer = SourcesFileWriter(path)
    for first, sources in reader.chunks():
        bounds = np.searchsorted(documents, (first, first + len(sources)))
        writer.add(sources.take(documents[slice(*bounds)] - first))
    return {MANIFEST_ENTRY: writer.finish(reader.files)}
