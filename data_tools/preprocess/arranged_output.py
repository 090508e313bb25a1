"""Output whose documents are shuffled, or compared with each other, before it is finished.

Documents and their records are first written to a staging folder: shuffled ones in sorted runs,
others in the order of the input. When all input is encoded, :meth:`ArrangedOutput.arrange` writes
the datasets from them. Both steps can be resumed.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_tools.preprocess.arrange import ArrangedDocuments
from data_tools.preprocess.document_records import Arrangement, Records
from data_tools.preprocess.duplicates import find_duplicates
from data_tools.preprocess.journal import ResumeJournal, SlicePosition, SourceCounts
from data_tools.preprocess.output import DatasetOutput
from data_tools.preprocess.packed_documents import PackedDocuments, join_documents
from data_tools.preprocess.recount import count_kept
from data_tools.preprocess.removal import DUPLICATES
from data_tools.preprocess.staged_dataset import StagedDataset
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.data.indexed_dataset_writer import (
    IndexedDatasetWriter,
    WriterPosition,
    open_at,
)

RUN_BYTES = 64 << 20
"""Bytes of tokens and records that are sorted in memory."""
SECONDS_BETWEEN_SAVES = 15.0
ORDER_SUFFIX = ".order"
"""Suffix of the records of a part of an array, in the order of its documents."""


class ArrangedOutput(DatasetOutput):
    """Datasets of all keys, whose documents are arranged at the end."""

    def __init__(
        self,
        prefix: str,
        keys: list[str],
        dtype: np.dtype[Any],
        arrangement: Arrangement,
        keep_records: bool,
    ) -> None:
        """Write to files that begin with ``prefix``.

        Args:
            prefix: of the output files.
            keys: JSON keys, one dataset each.
            dtype: of the tokens.
            arrangement: order of the documents.
            keep_records: also write the records, from which parts of an array are merged.
        """
        super().__init__(prefix, keys, dtype)
        self.arrangement, self.keep_records = arrangement, keep_records
        self._records: dict[str, BinaryIO] = {}
        self._waiting: dict[str, list[tuple[PackedDocuments, Records]]] = {}
        self._waiting_bytes = 0

    @property
    def staging(self) -> Path:
        """Folder of the documents that are not arranged yet."""
        return self.folder / "staging"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files of each dataset in the order of renaming."""
        return (".bin", *((ORDER_SUFFIX,) if self.keep_records else ()), ".json", ".idx")

    def open_writers(self, positions: Mapping[str, WriterPosition]) -> None:
        """Open the staging files at the given positions."""
        self.staging.mkdir(exist_ok=True)
        for key in self.keys:
            position = positions.get(key)
            writer = IndexedDatasetWriter(self.staging / f"{key}.bin", self.dtype, position)
            self.writers[key], self._waiting[key] = writer, []
            size = writer.position.documents * self.arrangement.dtype.itemsize
            self._records[key] = open_at(self.staging / f"{key}.records", size)

    def add(
        self, packed: dict[str, PackedDocuments], records: dict[str, Records] | None = None
    ) -> None:
        """Add the documents of a block, which may be kept in memory until :meth:`sync`."""
        assert records is not None
        for key, part in packed.items():
            self._waiting[key].append((part, records[key]))
            self._waiting_bytes += part.tokens.nbytes + records[key].nbytes
        if self.arrangement.shuffle_seed is None or self._waiting_bytes >= RUN_BYTES:
            self._write_run()

    def _write_run(self) -> None:
        """Write the documents in memory; sorted if they are shuffled."""
        for key, parts in self._waiting.items():
            if not parts:
                continue
            documents = join_documents([packed for packed, _ in parts], self.dtype)
            records = np.concatenate([found for _, found in parts])
            parts.clear()
            if self.arrangement.shuffle_seed is not None:
                order = np.argsort(self.arrangement.sort_keys(records))
                documents, records = documents.take(order), records[order]
            self.writers[key].add(documents.tokens, documents.lengths, documents.sequences)
            self._records[key].write(records.tobytes())
        self._waiting_bytes = 0

    def sync(self) -> None:
        """Write all documents added, and flush all files to disk."""
        self._write_run()
        for file in self._records.values():
            file.flush()
            os.fsync(file.fileno())
        super().sync()

    def arrange(self, journal: ResumeJournal, counts: Sequence[SourceCounts]) -> None:
        """Write the datasets from the staged documents, and count what duplicates leave.

        Args:
            journal: its last point has all input encoded.
            counts: counts of the sources, changed in place.
        """
        for key, file in self._records.items():
            file.close()
            self.writers[key].finish(self.staging / f"{key}.idx")
        staged = {key: self._staged(key) for key in self.keys}
        removed: npt.NDArray[Any] | None = None
        if self.arrangement.remove_duplicates:
            (removed,) = find_duplicates([staged[self.keys[0]]], self.folder / "duplicates")
            for key, dataset in staged.items():
                _recount(key, dataset, removed, counts)
        positions = dict(journal.last.arranged)
        for key, dataset in staged.items():
            self._arrange_key(key, dataset, removed, journal, positions)
        last = dataclasses.replace(
            journal.last,
            counts=counts[journal.last.source] if counts else SourceCounts(),
            finished=dict(enumerate(counts)),
            arranged=positions,
        )
        journal.add(last)

    def _staged(self, key: str) -> StagedDataset:
        index = read_index(self.staging / key)
        records = self.staging / f"{key}.records"
        dataset = StagedDataset(index, records, self.arrangement.dtype)
        dataset.check()
        return dataset

    def _arrange_key(
        self,
        key: str,
        dataset: StagedDataset,
        removed: npt.NDArray[Any] | None,
        journal: ResumeJournal,
        positions: dict[str, SlicePosition],
    ) -> None:
        """Write one dataset from the last saved slice on."""
        at = positions.get(key, SlicePosition())
        documents = ArrangedDocuments.of(
            [dataset], self.arrangement, None if removed is None else [removed]
        )
        writer = IndexedDatasetWriter(self.folder / f"{key}.bin", self.dtype, at.output)
        self.writers[key] = writer
        size = at.output.documents * self.arrangement.dtype.itemsize
        records_file = open_at(self.folder / f"{key}{ORDER_SUFFIX}", size)
        saved = shown = time.monotonic()
        with records_file:
            for number, parts in enumerate(documents.slice_parts(at.slices), at.slices + 1):
                for packed, records in parts:
                    writer.add(packed.tokens, packed.lengths, packed.sequences)
                    records_file.write(records.tobytes())
                now, is_last = time.monotonic(), number == documents.slices
                if is_last or now - shown > SECONDS_BETWEEN_SAVES:
                    shown = now
                    self._show(key, number, documents.slices)
                if is_last or now - saved > SECONDS_BETWEEN_SAVES:
                    saved = now
                    records_file.flush()
                    os.fsync(records_file.fileno())
                    positions[key] = SlicePosition(number, writer.sync())
                    journal.add(dataclasses.replace(journal.last, arranged=dict(positions)))

    def _show(self, key: str, done: int, slices: int) -> None:
        steps = {
            "removing duplicates": self.arrangement.remove_duplicates,
            "shuffling": self.arrangement.shuffle_seed is not None,
        }
        text = " and ".join(name for name, wanted in steps.items() if wanted)
        print(f"{key}: {text}: {done / slices:.0%}", file=sys.stderr, flush=True)


def _recount(
    key: str, dataset: StagedDataset, removed: npt.NDArray[Any], counts: Sequence[SourceCounts]
) -> None:
    """Set the counts of each source to those of the documents that are kept."""
    names = {number: found.texts.get(key, {}) for number, found in enumerate(counts)}
    kept = count_kept(dataset, removed, names)
    for number, source_counts in enumerate(counts):
        if number not in kept:
            continue
        total = kept[number].total
        source_counts.documents = total.documents
        source_counts.tokens[key] = total.tokens
        source_counts.texts[key] = kept[number].languages
        source_counts.removed[DUPLICATES] = kept[number].duplicates
